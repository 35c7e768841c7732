"""The choice of the most relevant entries: against plain autograd, and an adapter of just these."""

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.errors import ConfigError
from lorica.methods import Sparse
from lorica.methods.sparse import GRANULARITIES, SELECTIONS
from lorica.tasks.causal_lm import CausalLM
from lorica.train.starts import attach_by_records
from train.words import WordTokenizer
from train.words import examples as words

BASE = {"target_modules": ("q_proj", "down_proj"), "relevance_records": 5}


def causal_setup(count):
    return ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer()), words(1, count)


def gradients(model, task, examples, paths, squared):
    """Sums over the records, the plain way."""
    sums = dict.fromkeys(paths, 0)
    for example in examples:
        model.zero_grad()
        model.requires_grad_(True)
        with task.running(model):
            task.losses(model, task.collate([[example]], model))[0].backward()
        for path in paths:
            g = model.get_submodule(path).weight.grad
            sums[path] = sums[path] + (g.square() if squared else g.clone())
    model.zero_grad()
    return sums


@pytest.mark.parametrize("selection", ["fisher", "gradient", "gradient-weight", "magnitude"])
def test_the_best_entries_over_all_layers_are_taken(selection):
    model, task, examples = causal_setup(5)
    method = Sparse(selection=selection, density=0.03, **BASE)
    adapter, found = attach_by_records(model, method, task, examples, name="a")
    plain, task, examples = causal_setup(5)
    plain.eval()
    paths = list(found.sizes)
    weights = {path: plain.get_submodule(path).weight.detach() for path in paths}
    if selection == "magnitude":
        scores = {path: weights[path].abs() for path in paths}
    else:
        scores = gradients(plain, task, examples, paths, selection == "fisher")
        if selection == "gradient-weight":
            scores = {path: scores[path] * weights[path] for path in paths}
    flat = torch.cat([scores[path].detach().abs().flatten() for path in paths])
    k = round(0.03 * len(flat))
    threshold = flat.sort(descending=True).values[k - 1]
    assert sum(found.chosen.values()) == k == adapter.num_parameters
    for path, slot in adapter.slots.items():
        own = scores[path].detach().abs().flatten()
        taken = torch.zeros(len(own), dtype=torch.bool)
        taken[slot.tensors["indices"]] = True
        assert own[taken].min() >= threshold * (1 - 1e-4)
        assert (~taken).sum() == 0 or own[~taken].max() <= threshold * (1 + 1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_groups_are_whole_and_the_budget_holds(selection, granularity):
    model, task, examples = causal_setup(5)
    density = {"module": 0.6, "layer": 0.6, "head": 0.3}.get(granularity, 0.1)
    targets = {"target_modules": "attention"} if granularity == "head" else {}
    how = {"selection": selection, "granularity": granularity, "density": density}
    method = Sparse(**{**BASE, **how, **targets})
    adapter, found = attach_by_records(model, method, task, examples, name="a")
    assert 0 < adapter.num_parameters <= round(density * sum(found.sizes.values()))
    for path, slot in adapter.slots.items():
        width = model.get_submodule(path).in_features
        indices = slot.tensors["indices"]
        assert bool((indices.diff() > 0).all()) if len(indices) > 1 else True
        if granularity == "row":
            assert len(indices) % width == 0
            assert torch.equal(
                indices.view(-1, width)[:, 0] % width, torch.zeros(len(indices) // width)
            )
        if granularity in ("module", "layer"):
            assert len(indices) == found.sizes[path]
        if granularity == "head":
            along = indices % width if path.endswith("o_proj") else indices // width
            entries = (along // 12).unique(return_counts=True)[1]
            assert set(entries.tolist()) == {found.sizes[path] // len(found.heads[path])}
    if granularity == "layer":
        layers = {path.split(".")[2] for path in adapter.slots}
        assert len(layers) == 1 and len(adapter.slots) == len(BASE["target_modules"])


def test_gradient_times_input_of_heads_is_what_hooks_see():
    """|sum over tokens of g (W x)| over the outputs of a head; before o_proj |sum of x (W^T g)|."""
    model, task, examples = causal_setup(4)
    paths = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "o_proj")]
    how = {"selection": "gradient-input", "density": 0.5, "relevance_records": 4}
    method = Sparse(granularity="head", target_modules=("q_proj", "o_proj"), **how)
    _, found = attach_by_records(model, method, task, examples, name="a")
    plain, task, examples = causal_setup(4)
    plain.requires_grad_(True)
    seen = {}
    for path in paths:
        layer = plain.get_submodule(path)
        layer.register_forward_hook(lambda m, x, y, p=path: seen.update({p: (x[0], y)}))
    heads = {path: torch.zeros(3) for path in paths}
    for example in examples:
        with task.running(plain):
            loss = task.losses(plain, task.collate([[example]], plain))[0]
            for path in paths:
                x, y = seen[path]
                (g,) = torch.autograd.grad(loss, y, retain_graph=True)
                weight = plain.get_submodule(path).weight
                each = x * (g @ weight) if path.endswith("o_proj") else y * g
                heads[path] += each.detach().sum((0, 1)).view(3, 12).sum(1).abs()
    for path in paths:
        torch.testing.assert_close(torch.tensor(found.heads[path]), heads[path])
    assert found.as_dict()["places"][0]["heads"] and found.num_records == 4


def test_heads_are_refused_where_there_are_none():
    model, task, examples = causal_setup(4)
    with pytest.raises(ConfigError, match=r"down_proj is no layer of attention") as error:
        attach_by_records(model, Sparse(granularity="head", **BASE), task, examples)
    assert "target_modules: attention" in str(error.value)


def test_the_base_is_as_it_was_and_the_choice_repeats():
    model, task, examples = causal_setup(5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    one, _ = attach_by_records(model, Sparse(density=0.01, **BASE), task, examples, name="a")
    again, _ = attach_by_records(model, Sparse(density=0.01, **BASE), task, examples, name="b")
    for path, slot in one.slots.items():
        assert torch.equal(slot.tensors["indices"], again.slots[path].tensors["indices"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lorica.detach(model, "a")
    lorica.detach(model, "b")
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_it_trains_saves_loads_mixes_and_merges(tmp_path):
    model, task, examples = causal_setup(8)
    method = Sparse(density=0.02, **BASE)
    adapter, _ = attach_by_records(model, method, task, examples, name="a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3
    batch = task.collate([examples[:3]], model)

    def loss(own, mixture):
        with torch.no_grad(), activate(own, mixture), task.running(own):
            return task.losses(own, batch)[0]

    tuned = loss(model, "a")
    assert tuned != loss(model, None)
    lorica.save_adapter(adapter, tmp_path / "a")
    again, _, _ = causal_setup(8)
    lorica.load_adapter(again, tmp_path / "a", name="a")
    assert torch.equal(loss(again, "a"), tuned)
    lorica.merge(again, "a")
    torch.testing.assert_close(loss(again, None), tuned)


def test_what_cannot_be_chosen_is_refused():
    model, task, examples = causal_setup(4)
    with pytest.raises(ConfigError, match="need records to choose by, and there are none"):
        attach_by_records(model, Sparse(**BASE), task, [])
    for more in ({}, {"selection": "magnitude"}, {"selection": "random", "granularity": "row"}):
        with pytest.raises(ConfigError, match="settings of sparse need records or all weights"):
            lorica.attach(model, Sparse(**BASE, **more))  # `start` would draw single entries
    tiny = Sparse(density=1e-4, granularity="module", **BASE)
    with pytest.raises(ConfigError, match="not one module"):
        attach_by_records(model, tiny, task, examples)
    assert lorica.adapters(model) == {}

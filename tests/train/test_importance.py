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
from lorica.train.importance import attach_relevant
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
    adapter, found = attach_relevant(model, method, task, examples, name="a")
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
    density = 0.6 if granularity == "module" else 0.1
    method = Sparse(selection=selection, granularity=granularity, density=density, **BASE)
    adapter, found = attach_relevant(model, method, task, examples, name="a")
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
        if granularity == "module":
            assert len(indices) == found.sizes[path]


def test_the_base_is_as_it_was_and_the_choice_repeats():
    model, task, examples = causal_setup(5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    one, _ = attach_relevant(model, Sparse(density=0.01, **BASE), task, examples, name="a")
    again, _ = attach_relevant(model, Sparse(density=0.01, **BASE), task, examples, name="b")
    for path, slot in one.slots.items():
        assert torch.equal(slot.tensors["indices"], again.slots[path].tensors["indices"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lorica.detach(model, "a")
    lorica.detach(model, "b")
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_it_trains_saves_loads_mixes_and_merges(tmp_path):
    model, task, examples = causal_setup(8)
    method = Sparse(density=0.02, **BASE)
    adapter, _ = attach_relevant(model, method, task, examples, name="a")
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
    with pytest.raises(ConfigError, match="needs records"):
        attach_relevant(model, Sparse(**BASE), task, [])
    with pytest.raises(ConfigError, match="selection=fisher needs records to choose by"):
        lorica.attach(model, Sparse(**BASE))
    tiny = Sparse(density=1e-4, granularity="module", **BASE)
    with pytest.raises(ConfigError, match="not one module"):
        attach_relevant(model, tiny, task, examples)
    assert lorica.adapters(model) == {}

"""Starts from records: what they find, that the base stays, that they begin as the identity."""

import copy

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.config import TrainSettings
from lorica.errors import ConfigError, TargetError
from lorica.methods import DoRA, LoRA, LoRAFA
from lorica.tasks.causal_lm import CausalLM
from lorica.tasks.text_classification import TextClassification
from lorica.train.eva import Components
from lorica.train.starts import attach_by_records
from train.words import WordTokenizer, fast_tokenizer
from train.words import examples as words

STARTS = {
    "eva": LoRA(r=3, init_lora_weights="eva", target_modules="all-linear", init_records=24),
    "lora_ga": LoRA(r=3, init_lora_weights="lora_ga", target_modules="all-linear"),
    "eva-fa": LoRAFA(r=3, init_lora_weights="eva", target_modules="all-linear"),
    "eva-dora": DoRA(r=3, init_lora_weights="eva", target_modules="all-linear"),
    "eva-tokens": LoRA(
        r=3, init_lora_weights="eva", target_modules="mlp", trainable_token_indices=(3, 5)
    ),
    "ga-tokens": LoRA(
        r=3, init_lora_weights="lora_ga", target_modules="mlp", trainable_token_indices=(3, 5)
    ),
    "ga-rslora": LoRA(r=2, init_lora_weights="lora_ga", use_rslora=True, target_modules="mlp"),
}
every = pytest.mark.parametrize("start", STARTS)


def causal(count=40):
    return ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer()), words(1, count)


def logits(model, mixture):
    arch = ARCHITECTURES["llama"]
    with torch.no_grad(), activate(model, mixture):
        return arch.logits(model(**arch.sample(model, 2, 7)))


@every
def test_the_base_stays_and_the_adapter_begins_as_the_identity(start):
    model, task, examples = causal()
    before, expected = copy.deepcopy(model.state_dict()), logits(model, None)
    adapter, found = attach_by_records(model, STARTS[start], task, examples, name="a")
    rows = [path for path, slot in adapter.slots.items() if "rows" in slot.tensors]
    assert rows == (["model.embed_tokens"] if start.endswith("tokens") else [])
    assert torch.equal(logits(model, "a"), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert str(found) in adapter.reason
    again, _ = attach_by_records(model, STARTS[start], task, examples, name="b")
    for path, slot in adapter.slots.items():
        assert all(torch.equal(t, again.slots[path].tensors[n]) for n, t in slot.tensors.items())
    other, _ = attach_by_records(model, STARTS[start], task, words(2, 40), name="c")
    assert any(
        path not in other.slots
        or slot.tensors["A"].shape != other.slots[path].tensors["A"].shape
        or not torch.equal(slot.tensors["A"], other.slots[path].tensors["A"])
        for path, slot in adapter.slots.items()
    )


@every
def test_it_trains_and_goes_through_a_file(start, tmp_path):
    model, task, examples = causal()
    adapter, _ = attach_by_records(model, STARTS[start], task, examples, name="a")
    settings = TrainSettings(max_steps=4, learning_rate=1e-2, logging_steps=1)
    report = lorica.train(
        model, {adapter: examples}, settings, task=task, output_dir=tmp_path / "r"
    )
    tuned = logits(model, "a")
    assert not torch.equal(tuned, logits(model, None))
    fresh = ARCHITECTURES["llama"].build()
    lorica.load_adapter(fresh, report.folders["a"], name="a")
    torch.testing.assert_close(logits(fresh, "a"), tuned, rtol=1e-5, atol=1e-5)


def test_eva_finds_the_directions_of_the_inputs():
    """All records in one batch: the directions of a plain decomposition of the centred inputs."""
    model, task, examples = causal(8)
    method = LoRA(r=4, init_lora_weights="eva", eva_rho=1.0, target_modules=("q_proj", "up_proj"))
    adapter, found = attach_by_records(model, method, task, examples, name="a")
    plain = ARCHITECTURES["llama"].build()
    for path, slot in adapter.slots.items():
        rows = []
        layer = plain.get_submodule(path)
        hook = layer.register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0]))
        for example in examples:
            plain(torch.tensor([example.input_ids]))
            kept = torch.tensor([label != -100 for label in example.labels])
            rows[-1] = rows[-1][0][kept]
        hook.remove()
        inputs = torch.cat(rows).double()
        centred = inputs - inputs.mean(0)
        _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
        A = slot.tensors["A"].double()
        torch.testing.assert_close((A @ Vh[:4].T).abs(), torch.eye(4).double(), rtol=0, atol=1e-4)
        share = (S[:4].square().sum() / S.square().sum()).item()
        assert found.values[path] == pytest.approx(share, rel=1e-4)
        assert slot.method.r == 4 and not slot.tensors["B"].any()


def test_eva_moves_ranks_to_where_they_explain_most():
    model, task, examples = causal()
    adapter, found = attach_by_records(model, STARTS["eva"], task, examples, name="a")
    ranks = {path: slot.method.r for path, slot in adapter.slots.items()}
    assert sum(found.chosen.values()) == 3 * len(found.chosen) == sum(ranks.values())
    assert 6 >= max(ranks.values()) > min(found.chosen.values())
    assert all(slot.method.scale == pytest.approx(16 / 3) for slot in adapter.slots.values())
    assert {path for path, rank in found.chosen.items() if rank} == set(ranks)
    assert adapter.method.rank_pattern == {p: r for p, r in ranks.items() if r != 3}


def test_components_in_batches_are_those_of_all_rows():
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(3, 0.1, 12)
    rows = torch.randn(200, 12, generator=generator) * scales + 5
    found = Components(12)
    for start in range(0, 200, 40):
        found.add(rows[start : start + 40], 0.9)
    centred = (rows - rows.mean(0)).double()
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    ratios = S.square() / S.square().sum()
    torch.testing.assert_close(found.ratios, ratios, rtol=1e-4, atol=1e-6)
    turned = (found.directions.double() @ Vh.T).abs()
    torch.testing.assert_close(turned, torch.eye(12).double(), rtol=0, atol=1e-3)


def test_lora_ga_begins_in_the_directions_of_the_gradient():
    model, task, examples = causal(6)
    method = LoRA(
        r=3,
        init_lora_weights="lora_ga",
        init_records=6,
        lora_ga_gamma=4,
        target_modules=("o_proj",),
    )
    adapter, found = attach_by_records(model, method, task, examples, name="a")
    plain = ARCHITECTURES["llama"].build().requires_grad_(True)
    for example in examples:
        with task.running(plain):
            task.losses(plain, task.collate([[example]], plain))[0].backward()
    for path, slot in adapter.slots.items():
        gradient = plain.get_submodule(path).weight.grad
        U, S, Vh = torch.linalg.svd(gradient)
        c = 36**0.25 / 2
        torch.testing.assert_close((slot.tensors["A"] @ Vh[:3].T).abs(), c * torch.eye(3), **NEAR)
        torch.testing.assert_close(
            (U[:, 3:6].T @ slot.tensors["B"]).abs(), c * torch.eye(3), **NEAR
        )
        assert found.values[path] == pytest.approx(S.square().sum().sqrt().item(), rel=1e-4)
        assert torch.equal(slot.tensors["A0"], slot.tensors["A"])
        assert not slot.tensors["A0"].requires_grad


NEAR = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_classifier_of_an_encoder(init):
    model = ARCHITECTURES["bert"].build()
    tokenizer = fast_tokenizer("<s> $A </s>", pad_token="<pad>")
    task = TextClassification(tokenizer, ("a", "b", "c"), None)
    rows = [
        {"text": f"w{5 + i} w{6 + i % 7} w{9 + i % 3}", "label": "abc"[i % 3]} for i in range(30)
    ]
    method = LoRA(r=2, init_lora_weights=init, modules_to_save=("classifier",))
    adapter, found = attach_by_records(model, method, task, task.encode(rows).examples, name="a")
    assert "classifier" in adapter.slots and "classifier" not in found.values
    assert len(found.values) == 12


def test_what_cannot_be_started_so_is_refused():
    model, task, examples = causal(4)
    eva = LoRA(r=3, init_lora_weights="eva", target_modules="all-linear")
    with pytest.raises(ConfigError, match="need records") as error:
        lorica.attach(model, eva)
    assert "attach_by_records" in str(error.value)
    with pytest.raises(ConfigError, match="there are none"):
        attach_by_records(model, eva, task, [])
    with pytest.raises(ConfigError, match="too few inputs for eva") as error:
        wide = LoRA(r=16, init_lora_weights="eva", target_modules="mlp", init_records=1)
        attach_by_records(model, wide, task, examples)
    assert "raise init_records" in str(error.value)
    with pytest.raises(TargetError, match="takes 40 directions of the gradient for r=20"):
        ga = LoRA(r=20, init_lora_weights="lora_ga", target_modules=("q_proj",))
        attach_by_records(model, ga, task, examples)
    with pytest.raises(TargetError, match="eva needs a linear layer"):
        attach_by_records(
            model, LoRA(init_lora_weights="eva", target_modules=("embed_tokens",)), task, examples
        )
    with pytest.raises(ConfigError, match="nothing about lora with these settings"):
        attach_by_records(model, LoRA(), task, examples)
    with pytest.raises(ConfigError, match="lora_ga does not go with dora"):
        DoRA(r=2, init_lora_weights="lora_ga")
    assert lorica.adapters(model) == {}


def test_shares_are_told_only_where_they_were_given_out():
    model, task, examples = causal(8)
    found = {
        start: str(attach_by_records(model, STARTS[start], task, examples, name=start)[1])
        for start in ("eva", "lora_ga")
    }
    assert "%" in found["eva"] and "as many everywhere" not in found["eva"]
    assert "%" not in found["lora_ga"]
    assert "as many everywhere; largest norm of the gradient: " in found["lora_ga"]


def test_settings_of_another_start_are_told():
    with pytest.raises(ConfigError) as error:
        LoRA(eva_rho=3.0, init_records=10, loftq_iter=2)
    assert len(error.value.problems) == 3
    assert "eva_rho=3.0 has no effect with init_lora_weights=kaiming" in str(error.value)
    with pytest.raises(ConfigError, match=r"eva_rho is 0\.5"):
        LoRA(init_lora_weights="eva", eva_rho=0.5)

"""An adapter that is trained on top of another one, which stays as it is and acts with it."""

import json
import shutil

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.config import TrainSettings
from lorica.errors import AdapterFileError, ConfigError, Interrupted
from lorica.files.average import average
from lorica.files.transfer import begin_from
from lorica.methods import (
    IA3,
    AdaLoRA,
    Bottleneck,
    LoRA,
    LoReFT,
    PrefixTuning,
    PromptTuning,
    Selective,
)
from lorica.mix import merge
from lorica.tasks.causal_lm import CausalLM
from train.runs import stop_after
from train.words import WordTokenizer, examples

ALL = {"target_modules": "all-linear"}
PAIRS = [
    (PromptTuning(num_virtual_tokens=3), LoRA(r=2, lora_dropout=0.2, **ALL)),
    (LoRA(r=2, lora_dropout=0.2, **ALL), LoRA(r=3, **ALL)),
    (LoRA(r=2, **ALL), PrefixTuning(num_virtual_tokens=3)),
    (Bottleneck(reduction_factor=6), LoRA(r=2, **ALL)),
    (LoRA(r=2, **ALL), Selective(parameters="norm")),
    (Selective(parameters="norm"), Selective(parameters="norm")),
    (LoRA(r=2, **ALL), IA3()),
    (LoReFT(r=2), LoRA(r=2, **ALL)),
]
IDS = [f"{upper.kind}-on-{lower.kind}" for lower, upper in PAIRS]
IDS_OF = torch.arange(1, 9)[None]


def jolt(adapter, seed=4):
    """Tensors as a training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 20
    return adapter


def staged(lower, upper):
    """A model with `upper` on top of a trained `lower`."""
    model = ARCHITECTURES["llama"].build().eval()
    below = jolt(lorica.attach(model, lower, name="first"))
    return model, below, lorica.attach(model, upper, name="second", on=below)


def answers(model, mixture):
    with torch.no_grad(), lorica.activate(model, mixture):
        return model(IDS_OF.expand(len(mixture) if isinstance(mixture, list) else 1, -1)).logits


def run(model, folder, *, resume=False, steps=6):
    settings = {"learning_rate": 2e-2, "batch_size": 4, "save_steps": 2, "logging_steps": 1}
    return lorica.train(
        model,
        {"second": examples(1, 12)},
        TrainSettings(**settings, max_steps=steps, lr_scheduler_type="constant"),
        output_dir=folder,
        task=CausalLM.of(WordTokenizer()),
        resume=resume,
    )


def tensors(adapter):
    return {
        f"{path}.{key}": tensor.detach().clone()
        for path, slot in adapter.slots.items()
        for key, tensor in slot.tensors.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("lower", "upper"), PAIRS, ids=IDS)
def test_a_second_stage_learns_and_the_first_stays(lower, upper, tmp_path):
    model, below, adapter = staged(lower, upper)
    assert not list(below.parameters()) and list(adapter.parameters())
    start = answers(model, below)
    if upper.kind != "prefix-tuning":  # which is no identity at its start
        assert torch.allclose(answers(model, adapter), start, atol=1e-5)
    before, held = tensors(below), tensors(adapter)
    run(model, tmp_path / "run", steps=16)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert same(before, tensors(below)) and not same(held, tensors(adapter))
    trained = answers(model, adapter)
    assert not torch.allclose(trained, start, atol=1e-4)

    other = ARCHITECTURES["llama"].build().eval()
    loaded = lorica.load_adapter(other, tmp_path / "run" / "adapter", name="again")
    assert [stage.method.kind for stage in loaded.stages] == [lower.kind, upper.kind]
    assert same(before, tensors(loaded.on)) and not list(loaded.on.parameters())
    assert torch.equal(answers(other, "again"), trained)
    lorica.save_adapter(loaded, tmp_path / "copy")
    for name in ("adapter_model.safetensors", "on/adapter_model.safetensors"):
        first, second = tmp_path / "run" / "adapter" / name, tmp_path / "copy" / name
        assert first.read_bytes() == second.read_bytes()
    lorica.detach(other, "again")
    assert not lorica.adapters(other)
    bare = ARCHITECTURES["llama"].build().eval()
    assert torch.equal(other(IDS_OF).logits, bare(IDS_OF).logits)


@pytest.mark.parametrize("at", [0, 1], ids=[IDS[0], IDS[1]])
def test_a_stopped_second_stage_goes_on_to_the_same_bits(at, tmp_path, monkeypatch):
    model, _, adapter = staged(*PAIRS[at])
    run(model, tmp_path / "whole")
    wanted = tensors(adapter)
    model, _, adapter = staged(*PAIRS[at])
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Interrupted):
            run(model, tmp_path / "run")
    model, _, adapter = staged(*PAIRS[at])
    run(model, tmp_path / "run", resume=True)
    assert same(wanted, tensors(adapter))
    model = ARCHITECTURES["llama"].build()
    other = jolt(lorica.attach(model, PAIRS[at][0], name="first"), seed=5)
    lorica.attach(model, PAIRS[at][1], name="second", on=other)
    with pytest.raises(lorica.LoricaError, match="first, below second"):
        run(model, tmp_path / "run", resume=True)


def test_gradients_are_those_on_a_base_with_the_first_stage_in_its_weights():
    lower, upper = LoRA(r=2, lora_dropout=0.5, **ALL), LoRA(r=3, **ALL)
    model, _, adapter = staged(lower, upper)
    merged = ARCHITECTURES["llama"].build()
    merge(merged, jolt(lorica.attach(merged, lower, name="first")))
    alone = lorica.attach(merged, upper, name="second")
    jolt(adapter, 7), jolt(alone, 7)
    found = []
    for one, own in ((model, adapter), (merged, alone)):
        one.train()
        with lorica.activate(one, own):
            one(IDS_OF, labels=IDS_OF).loss.backward()
        found.append([parameter.grad for parameter in own.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), "without the dropout of the first stage"


def test_shares_and_rows_take_the_first_stage_along():
    model, below, adapter = staged(LoRA(r=2, **ALL), LoRA(r=3, **ALL))
    jolt(adapter)
    rows = answers(model, ["second", "first", None])
    for row, mixture in zip(rows, ["second", "first", None], strict=True):
        assert torch.allclose(row, answers(model, mixture)[0], atol=1e-5)
    half = answers(model, {"second": 0.5})
    lorica.detach(model, adapter)
    assert torch.allclose(answers(model, {below: 1.0}), rows[1:2], atol=1e-5)
    assert list(below.parameters()), "it may train again"
    model, below, adapter = staged(LoRA(r=2, **ALL), LoRA(r=3, **ALL))
    jolt(adapter)
    whole = lorica.attach(model, LoRA(r=3, **ALL), name="apart")
    for path, slot in whole.slots.items():
        slot.tensors.update(adapter.slots[path].tensors)
    parts = answers(model, {"first": 0.5, "apart": 0.5})
    assert torch.allclose(half, parts, atol=1e-5)


def test_both_stages_merge_and_leave():
    model, _, adapter = staged(LoRA(r=2, **ALL), LoRA(r=3, **ALL))
    jolt(adapter)
    wanted = answers(model, adapter)
    with pytest.raises(lorica.LoricaError, match="first lies below second"):
        merge(model, "first")
    report = merge(model, adapter)
    assert set(report.weights) == {"first", "second"} and not lorica.adapters(model)
    with torch.no_grad():
        assert torch.allclose(model(IDS_OF).logits, wanted, atol=1e-5)


def test_three_stages(tmp_path):
    model, _, second = staged(PromptTuning(num_virtual_tokens=2), LoRA(r=2, **ALL))
    third = jolt(lorica.attach(model, IA3(), name="third", on=jolt(second)))
    lorica.save_adapter(third, tmp_path / "three")
    other = ARCHITECTURES["llama"].build().eval()
    loaded = lorica.load_adapter(other, tmp_path / "three")
    assert [a.name for a in loaded.stages] == ["default.on.on", "default.on", "default"]
    assert torch.equal(answers(model, third), answers(other, loaded))
    facts = json.loads((tmp_path / "three" / "lorica.json").read_text())
    assert facts["on"]["method"] == "lora" and len(facts["on"]["digest"]) == 64
    card = (tmp_path / "three" / "README.md").read_text()
    assert "on top of another adapter (prompt-tuning, lora)" in card and "PeftModel" not in card


UNIONS = [
    (PrefixTuning(num_virtual_tokens=3), Bottleneck(layout="parallel", reduction_factor=6)),
    (LoRA(r=2, lora_dropout=0.2, **ALL), Bottleneck(reduction_factor=6)),
    (LoRA(r=2, **ALL), Selective(parameters="norm")),
]


def united(lower, upper, name="second"):
    model = ARCHITECTURES["llama"].build().eval()
    below = lorica.attach(model, lower, name="first")
    return model, below, lorica.attach(model, upper, name=name, on=below, together=True)


@pytest.mark.parametrize(("lower", "upper"), UNIONS, ids=lambda method: method.kind)
def test_methods_train_together_as_one_adapter(lower, upper, tmp_path, monkeypatch):
    model, below, adapter = united(lower, upper)
    parts = sum(p.numel() for p in below.parameters())
    own = sum(p.numel() for key, p in adapter.named_parameters() if not key.startswith("on/"))
    assert adapter.num_parameters == parts + own and parts and own
    before = {**tensors(below), **{f"own.{k}": t for k, t in tensors(adapter).items()}}
    run(model, tmp_path / "whole", steps=16)
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3])
    after = {**tensors(below), **{f"own.{k}": t for k, t in tensors(adapter).items()}}
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any(key.startswith("own.") for key in moved)
    assert any(not key.startswith("own.") for key in moved)

    other = ARCHITECTURES["llama"].build().eval()
    loaded = lorica.load_adapter(other, tmp_path / "whole" / "adapter")
    assert torch.equal(answers(other, loaded), answers(model, adapter))
    assert loaded.together and loaded.num_parameters == adapter.num_parameters

    model, _, _ = united(lower, upper)
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        with pytest.raises(Interrupted):
            run(model, tmp_path / "run", steps=16)
    model, below, adapter = united(lower, upper)
    run(model, tmp_path / "run", steps=16, resume=True)
    assert same(after, {**tensors(below), **{f"own.{k}": t for k, t in tensors(adapter).items()}})


def test_what_cannot_train_together_is_refused():
    model, below, adapter = staged(LoRA(r=2, **ALL), LoRA(r=3, **ALL))
    with pytest.raises(ConfigError, match="detach that first"):
        lorica.attach(model, IA3(), name="third", on=below, together=True)
    with pytest.raises(ConfigError, match="has no effect without an adapter"):
        lorica.attach(model, IA3(), name="third", together=True)
    with pytest.raises(ConfigError, match="adalora acts between the steps"):
        method = AdaLoRA(init_r=3, target_r=2, **ALL)
        lorica.attach(model, method, name="third", on=adapter, together=True)
    assert list(lorica.adapters(model)) == ["first", "second"]


def test_what_cannot_be_stages_is_refused_with_a_mend(tmp_path):
    model, below, adapter = staged(PromptTuning(num_virtual_tokens=2), LoRA(r=2, **ALL))
    for method in (PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2)):
        with pytest.raises(ConfigError, match="virtual tokens stand before a row once") as error:
            lorica.attach(model, method, name="third", on=adapter)
        assert "init_adapter" in str(error.value)
    with pytest.raises(ConfigError, match="do not go together"):
        lorica.attach(model, LoReFT(r=2), name="third", on=adapter)
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        lorica.attach(model, IA3(), name="third", on="secand")
    with pytest.raises(ConfigError, match="detach 'second' first"):
        lorica.detach(model, below)
    with pytest.raises(ConfigError, match="'first' does not train by itself"):
        data, task = {"first": examples(1, 4)}, CausalLM.of(WordTokenizer())
        lorica.train(model, data, output_dir=tmp_path / "run", task=task)
    assert list(lorica.adapters(model)) == ["first", "second"] and not list(below.parameters())
    lorica.save_adapter(adapter, tmp_path / "two")
    lorica.detach(model, adapter)
    with pytest.raises(AdapterFileError, match="have no mean"):
        average([tmp_path / "two", tmp_path / "two"], tmp_path / "mean")
    fresh = lorica.attach(model, LoRA(r=2, **ALL), name="fresh")
    with pytest.raises(AdapterFileError, match="on top of prompt-tuning, which would be lost"):
        begin_from(fresh, tmp_path / "two")
    assert list(lorica.adapters(model)) == ["first", "fresh"]


def test_a_folder_whose_first_stage_is_missing_or_another_is_refused(tmp_path):
    model, below, adapter = staged(LoRA(r=2, **ALL), LoRA(r=3, **ALL))
    lorica.save_adapter(adapter, tmp_path / "two")
    other = ARCHITECTURES["llama"].build()
    shutil.move(tmp_path / "two" / "on", tmp_path / "aside")
    with pytest.raises(AdapterFileError, match="there is no folder"):
        lorica.load_adapter(other, tmp_path / "two")
    (tmp_path / "two" / "on").symlink_to(tmp_path / "aside")
    with pytest.raises(AdapterFileError, match="there is no folder"):
        lorica.load_adapter(other, tmp_path / "two")
    (tmp_path / "two" / "on").unlink()
    lorica.detach(model, adapter)
    lorica.save_adapter(jolt(below), tmp_path / "two" / "on")
    with pytest.raises(AdapterFileError, match="another adapter than the one"):
        lorica.load_adapter(other, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "on")
    shutil.move(tmp_path / "aside", tmp_path / "two" / "on")
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError):
        lorica.load_adapter(other, tmp_path / "two")
    assert not lorica.adapters(other), "the first stage is off again"


def test_a_chain_without_end_is_refused(tmp_path):
    model = ARCHITECTURES["llama"].build()
    adapter = lorica.attach(model, LoRA(r=1, **ALL), name="a0")
    for number in range(1, 9):
        adapter = lorica.attach(model, LoRA(r=1, **ALL), name=f"a{number}", on=adapter)
    lorica.save_adapter(adapter, tmp_path / "many")
    other = ARCHITECTURES["llama"].build()
    with pytest.raises(AdapterFileError, match="more than 8 adapters"):
        lorica.load_adapter(other, tmp_path / "many")
    assert not lorica.adapters(other)

"""Undoing a merge gives back the very bits, and the adapters that were there."""

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.attach.handle import adapters
from lorica.attach.site import is_site
from lorica.errors import MergeError
from lorica.methods import METHODS
from lorica.methods.lora import LoRA
from lorica.mix import merge

KINDS = ["lora", "dora", "loha", "lokr", "ia3", "vera", "selective"]


def stirred(model: nn.Module, method, name: str = "a", size: float = 0.05, **how):
    adapter = attach(model, method, name=name, **how)
    with torch.no_grad():
        for parameter in adapter.parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


def answer(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return ARCHITECTURES[name].logits(model(**ARCHITECTURES[name].sample(model, 2, 7)))


@pytest.mark.filterwarnings("ignore:rounding destroyed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_very_bits_come_back(kind, dtype):
    model = ARCHITECTURES["llama"].build().to(dtype)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    adapter = stirred(model, METHODS[kind]())
    with activate(model, "a"):
        attached = answer("llama", model)
    report = merge(model, {"a": 1.0}, force=True)
    changed = [key for key, t in model.state_dict().items() if not torch.equal(t, before[key])]
    assert changed and not adapters(model)
    report.undo()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert adapters(model)["a"] is adapter
    assert not any(p.requires_grad for p in model.parameters())
    with activate(model, "a"):
        assert torch.equal(answer("llama", model), attached)
    detach(model, "a")
    assert not any(is_site(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_ties_are_tied_again():
    model = ARCHITECTURES["llama-tied"].build()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    keys = dict(model.all_tied_weights_keys)
    stirred(model, LoRA(r=3, target_modules=("embed_tokens", "lm_head", "q_proj")), size=0.2)
    report = merge(model, "a")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    report.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True and model.all_tied_weights_keys == keys
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_stages_come_back_together():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(r=2, target_modules="q_proj"), "low")
    top = stirred(model, LoRA(r=2, target_modules="v_proj"), "top", on="low")
    report = merge(model, "top")
    assert not adapters(model)
    report.undo()
    assert list(adapters(model)) == ["low", "top"] and top.on is adapters(model)["low"]
    assert all(slot.rests for slot in adapters(model)["low"].slots.values())


def test_what_cannot_be_undone():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(r=2, target_modules="q_proj"))
    stirred(model, LoRA(r=2, target_modules="q_proj"), "bb")
    first = merge(model, "a")
    second = merge(model, "bb")
    with pytest.raises(MergeError, match="written since"):
        first.undo()
    second.undo()
    with pytest.raises(MergeError, match="already"):
        second.undo()
    with pytest.raises(MergeError, match="not kept"):
        merge(model, "bb", keep=False).undo()


def test_a_name_that_was_taken_since():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(r=2, target_modules="q_proj"))
    report = merge(model, "a")
    attach(model, LoRA(r=1, target_modules="q_proj"), name="a")
    with pytest.raises(MergeError, match="attached since"):
        report.undo()

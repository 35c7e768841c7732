"""Adapters on bases that are quantized, by Lorica and by others."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lorica
from architectures import llama_of_width
from lorica.attach.attach import put_back
from lorica.attach.layers import describe
from lorica.base.quantize import quantization_of, quantize_model, quantized_layers
from lorica.base.quantized import QuantizedLinear
from lorica.base.storage import read_weight
from lorica.errors import BaseModelError, LoricaWarning, MergeError, TargetError
from lorica.evaluate.requantized import how_far
from lorica.methods.dora import DoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.starts import attach_by_records
from train.words import WordTokenizer, examples

IDS = torch.arange(24)[None]
SWITCH = "support_avx512bf16_for_cpu"


@pytest.fixture
def nf4() -> nn.Module:
    return lorica.load_model("embedded", dtype="float32", quantize="nf4")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(model: nn.Module, method) -> None:
    """An adapter after one step by hand."""
    adapter = lorica.attach(model, method, name="a")
    with lorica.activate(model, "a"):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        parameter.data -= 0.05 * parameter.grad.sign()


def test_attaching_and_detaching_leave_everything_as_it_was(nf4):
    before = {key: tensor.clone() for key, tensor in nf4.state_dict().items()}
    kinds = [type(module) for module in nf4.modules()]
    trained(nf4, lorica.LoRA(r=4, target_modules="all-linear"))
    assert all(isinstance(m, QuantizedLinear) for _, m in quantized_layers(nf4))
    inside = nf4.state_dict()
    assert inside.keys() == before.keys()
    lorica.detach(nf4, "a")
    after = nf4.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(module) for module in nf4.modules()] == kinds


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_merged_into_numbers_it_answers_as_attached(word):
    model = lorica.load_model("embedded", dtype="float32", quantize=word)
    trained(model, lorica.LoRA(r=4, target_modules="attention"))
    with lorica.activate(model, "a"):
        expected = logits(model)
    report = lorica.merge(model, "a")
    assert report.damage < 1e-3
    assert quantization_of(model) is None  # the other layers too
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert all(type(m) is not QuantizedLinear for m in model.modules())


def test_quantized_again_the_damage_is_told_first(nf4):
    trained(nf4, lorica.LoRA(r=4, target_modules="attention"))
    with lorica.activate(nf4, None):
        before = logits(nf4)
    moved = how_far(nf4, {"a": 1.0})
    assert moved.change > 0.01 and moved.weights and "off by" in str(moved)
    with pytest.raises(MergeError, match="off by"):
        lorica.merge(nf4, "a", requantize=True)
    with lorica.activate(nf4, None):
        assert torch.equal(logits(nf4), before)
    with pytest.warns(LoricaWarning, match="off by"):
        report = lorica.merge(nf4, "a", requantize=True, force=True)
    assert quantization_of(nf4) is not None
    assert {w.path: w.damage for w in report.merged} == moved.weights


def test_loftq_makes_up_for_a_part_of_the_rounding(nf4):
    exact = lorica.load_model("embedded", dtype="float32")
    bytes_before = {key: tensor.clone() for key, tensor in nf4.state_dict().items()}
    method = lorica.LoRA(r=16, target_modules="all-linear", init_lora_weights="loftq")
    adapter = lorica.attach(nf4, method, name="a")
    wanted, bare = logits(exact), logits_of(nf4, None)
    assert (logits_of(nf4, "a") - wanted).norm() < 0.9 * (bare - wanted).norm()
    for path, slot in adapter.slots.items():
        module = nf4.get_submodule(path)
        lost = exact.get_submodule(path).weight - read_weight(module)
        update = slot.method.delta(slot.tensors, describe(module))
        assert (lost - update).norm() < lost.norm()
    assert all(torch.equal(nf4.state_dict()[k], t) for k, t in bytes_before.items())


def logits_of(model: nn.Module, mixture) -> torch.Tensor:
    with lorica.activate(model, mixture):
        return logits(model)


def test_loftq_without_the_exact_weights_is_refused():
    model = lorica.load_model("embedded", dtype="float32")
    quantize_model(model, "nf4")
    with pytest.raises(TargetError) as caught:
        lorica.attach(model, lorica.LoRA(r=2, init_lora_weights="loftq"), name="a")
    assert "not at hand" in str(caught.value)


def test_pissa_begins_as_the_quantized_base(nf4):
    before = logits(nf4)
    lorica.attach(nf4, lorica.LoRA(r=4, init_lora_weights="pissa"), name="a")
    assert torch.equal(logits_of(nf4, "a"), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_transformers_quantized_by_bitsandbytes(bits, tmp_path):
    model = quantized_by_bitsandbytes(tmp_path, bits, hidden=128)
    model.train()  # else a 4-bit layer is packed anew for inference; nothing in it draws
    before = logits(model)
    trained(model, lorica.LoRA(r=4, target_modules="attention"))
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=2e-2)
    assert not torch.equal(logits_of(model, "a"), before)
    with pytest.raises(MergeError) as caught:
        lorica.merge(model, "a")
    assert "bitsandbytes" in str(caught.value)
    lorica.detach(model, "a")
    dora = lorica.attach(model, DoRA(r=4, target_modules="attention"), name="d")
    assert all(slot.tensors["m"].isfinite().all() for slot in dora.slots.values())
    torch.testing.assert_close(logits_of(model, "d"), before, rtol=1e-3, atol=2e-2)


def quantized_by_bitsandbytes(folder: Path, bits: int, hidden: int) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama_of_width(hidden).save_pretrained(folder)
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32
    )
    return model.eval()


def test_a_pass_without_gradients_does_not_end_those_of_bitsandbytes(tmp_path):
    """On a processor with AVX-512 and bfloat16 it packs layers anew then, and loses gradients."""
    model = quantized_by_bitsandbytes(tmp_path, 4, hidden=128)
    layers = [m for m in model.modules() if hasattr(m, SWITCH)]
    assert len(layers) == 14
    for layer in layers:  # what it is on such a processor
        setattr(layer, SWITCH, True)
    adapter = lorica.attach(model, lorica.LoRA(r=4, target_modules=["q_proj"]), name="a")
    assert not any(getattr(layer, SWITCH) for layer in layers)

    def gradients():
        with lorica.activate(model, "a"):
            model(IDS, labels=IDS).loss.backward()
        found = [p.grad.clone() for p in adapter.parameters()]
        for parameter in adapter.parameters():
            parameter.grad = None
        return found

    before = gradients()
    logits_of(model, "a")
    after = gradients()
    assert any(g.abs().sum() > 0 for g in before[:2])  # of the lowest layer
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    lorica.detach(model, "a")
    assert all(getattr(layer, SWITCH) for layer in layers)


def test_layers_that_bitsandbytes_packed_anew_are_refused(tmp_path):
    model = quantized_by_bitsandbytes(tmp_path, 4, hidden=128)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(BaseModelError) as caught:
        lorica.attach(model, lorica.LoRA(r=4))
    assert "packed for inference" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "attach before the first forward pass" in caught.value.mend
    assert not lorica.adapters(model)


def test_a_base_that_was_packed_meanwhile_does_not_get_its_adapter_back(tmp_path):
    model = quantized_by_bitsandbytes(tmp_path, 4, hidden=128)
    adapter = lorica.attach(model, lorica.LoRA(r=4, target_modules=["lm_head"]), name="a")
    report = lorica.merge(model, adapter)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as a pass without gradients has it
    merged = model.lm_head.weight.clone()
    with pytest.raises(BaseModelError, match="packed for inference"):
        report.undo()
    assert torch.equal(model.lm_head.weight, merged)
    with pytest.raises(BaseModelError, match="packed for inference"):
        put_back(adapter)
    assert not lorica.adapters(model)
    layer.weight.quant_state.packing_format_for_cpu = False
    report.undo()
    assert list(lorica.adapters(model)) == ["a"]


def test_choosing_by_records_does_not_have_a_base_of_bitsandbytes_packed(tmp_path):
    model = quantized_by_bitsandbytes(tmp_path, 4, hidden=128)
    held = []
    layer = model.model.layers[0].self_attn.q_proj
    setattr(layer, SWITCH, True)
    layer.register_forward_pre_hook(lambda *_: held.append(not getattr(layer, SWITCH)))
    method = lorica.LoRA(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    adapter, _ = attach_by_records(model, method, CausalLM.of(WordTokenizer()), examples(0, 8))
    assert held
    assert all(held)
    assert not getattr(layer, SWITCH)
    lorica.detach(model, adapter)
    assert getattr(layer, SWITCH)


@pytest.mark.parametrize("wrong", [True, False])
def test_layers_that_bitsandbytes_misreads_are_refused(tmp_path, monkeypatch, wrong):
    """Its kernel for AVX-512 does, where rows are no multiple of a block: 160 features here."""
    model = quantized_by_bitsandbytes(tmp_path, 4, hidden=160)
    layers = [m for m in model.modules() if hasattr(m, SWITCH)]
    numbers = {m.weight.data_ptr(): read_weight(m) for m in layers}
    monkeypatch.setattr(
        "bitsandbytes.functional.dequantize_4bit",
        lambda packed, state: numbers[packed.data_ptr()] + wrong,
    )
    if not wrong:
        lorica.attach(model, lorica.LoRA(r=4))
        return
    with pytest.raises(BaseModelError) as caught:
        lorica.attach(model, lorica.LoRA(r=4))
    assert "misread" in str(caught.value)
    assert "down_proj" not in str(caught.value)  # 192 features are three blocks
    assert not lorica.adapters(model)


def test_a_base_that_torchao_quantized():
    torchao = pytest.importorskip("torchao.quantization")
    model = lorica.load_model("embedded", dtype="float32")
    exact = read_weight(model.model.layers[0].self_attn.q_proj).clone()
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    layer = model.model.layers[0].self_attn.q_proj
    assert 0 < (read_weight(layer) - exact).norm() / exact.norm() < 0.02
    before = logits(model)
    trained(model, lorica.LoRA(r=4, target_modules="attention"))
    assert not torch.equal(logits_of(model, "a"), before)
    with pytest.raises(MergeError) as caught:
        lorica.merge(model, "a")
    assert "torchao" in str(caught.value)

"""Bases that are quantized in memory, on the way in, and on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorica
from architectures import llama_of_width
from lorica.base.four_bit import FP4, NF4
from lorica.base.known import base_of
from lorica.base.quantize import (
    QUANTIZERS,
    dequantize_model,
    quantizable,
    quantization_of,
    quantize_model,
    quantized_layers,
    quantizer_of,
)
from lorica.base.storage import num_parameters, read_weight, weight_dtype
from lorica.errors import BaseModelError
from lorica.files.quantized import save_base

EVERY = pytest.mark.parametrize("word", sorted(QUANTIZERS))


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return lorica.load_model("embedded", dtype="float32")


@pytest.fixture(scope="module")
def nf4() -> nn.Module:
    return lorica.load_model("embedded", dtype="float32", quantize="nf4")


# --- layers ---------------------------------------------------------------------------------------


@EVERY
def test_a_layer_stays_the_object_that_it_is(word):
    model = two_layers()
    before, bias = list(model), model[0].bias
    numbers = num_parameters(model)
    exact = [read_weight(m).clone() for m in (model[0], model[2])]
    assert quantize_model(model, word) == ["0", "2"]
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert isinstance(model[0], nn.Linear) and model[0].bias is bias
    assert num_parameters(model) == numbers
    for module, weight in zip((model[0], model[2]), exact, strict=True):
        error = (read_weight(module) - weight).norm() / weight.norm()
        assert 0 < error < {"nf4": 0.11, "fp4": 0.16, "int8": 0.01}[word]
    dequantize_model(model)
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == torch.float32
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]


@EVERY
def test_forward_and_gradient_are_those_of_the_numbers(word):
    model = two_layers()
    quantize_model(model, word)
    twin = two_layers()
    for own, other in ((model[0], twin[0]), (model[2], twin[2])):
        other.weight.data.copy_(read_weight(own))
    x, y = (torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    y.requires_grad_()
    model(x).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].bias.grad, twin[0].bias.grad, rtol=1e-5, atol=1e-5)


@EVERY
def test_nothing_of_a_weight_is_kept_for_the_backward_pass(word):
    model = two_layers()
    quantize_model(model, word)
    lorica.attach(model, lorica.LoRA(r=2, target_modules=("0", "2")), name="a")
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 64, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        lorica.activate(model, "a"),
    ):
        model(x).sum().backward()
    assert kept and max(t.numel() for t in kept) < 64 * 32


@EVERY
def test_the_state_dict_comes_back_strictly(word):
    model, other = two_layers(), two_layers()
    quantize_model(model, word)
    other[0].weight.data.mul_(3)
    quantize_model(other, word)
    assert not same(model, other)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(model, other)
    broken = dict(model.state_dict())
    broken.pop("2.weight")
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        other.load_state_dict(broken, strict=True)
    assert same(model, other)


@EVERY
@pytest.mark.parametrize("shape", [(5, 7), (1, 65), (33, 70), (3, 1)])
def test_shapes_that_no_block_divides(word, shape):
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(shape[1], shape[0])) for _ in range(2))
    exact = model[0].weight.detach().clone()
    for one in (model, other):
        quantize_model(one, word)
    assert not same(model, other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, shape[1])
    assert torch.equal(model(x), other(x))
    assert read_weight(model[0]).shape == shape
    assert (read_weight(model[0]) - exact).abs().max() < 0.2 * exact.abs().max()


def test_scales_keep_their_dtype_and_the_numbers_follow():
    model = two_layers()
    quantize_model(model, NF4(double_quant=False))
    before = model[0].absmax.clone()
    model.to(torch.bfloat16)
    assert weight_dtype(model[0]) == torch.bfloat16 and model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model[0].absmax, before)
    assert model(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bits_per_parameter():
    layer = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    quantize_model(layer, "nf4")
    stored = [*layer.parameters(), *layer.buffers()]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored) / 1024**2
    assert bits <= 4.13


# --- bitsandbytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NF4(), FP4(), NF4(128, False)], ids=str)
def test_state_dicts_go_to_bitsandbytes_and_back(kind):
    bnb = pytest.importorskip("bitsandbytes")
    how = {
        "quant_type": kind.word,
        "compress_statistics": kind.double_quant,
        "compute_dtype": torch.float32,
    }
    # its kernel for AVX-512 misreads rows that are no multiple of a block
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    theirs = bnb.nn.Linear4bit(128, 96, bias=False, **how)
    params = bnb.nn.Params4bit(
        weight.clone(), False, quant_type=kind.word, blocksize=kind.block_size,
        compress_statistics=kind.double_quant,
    )  # fmt: skip
    theirs.weight = params.to("cpu")
    ours = nn.Sequential(nn.Linear(128, 96, bias=False))
    ours[0].weight.data.copy_(weight)
    quantize_model(ours, kind)
    a, b = ours[0].state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    key = f"weight.quant_state.bitsandbytes__{kind.word}"
    read = [json.loads(bytes(d[key].tolist())) for d in (a, b)]
    assert read[0] == read[1]
    assert all(torch.equal(a[k], b[k]) for k in a if k != key)
    other = nn.Sequential(nn.Linear(128, 96, bias=False))
    quantize_model(other, kind)
    other[0].load_state_dict(b)
    x = torch.randn(3, 128)
    assert torch.equal(read_weight(other[0]), read_weight(ours[0]))
    assert torch.equal(read_weight(theirs), read_weight(ours[0]))
    torch.testing.assert_close(theirs(x), ours(x))
    back = bnb.nn.Params4bit.from_prequantized(
        a["weight"], {k.removeprefix("weight."): v for k, v in a.items() if k != "weight"},
        device="cpu",
    )  # fmt: skip
    there = bnb.functional.dequantize_4bit(back.data, back.quant_state)
    assert torch.equal(there, read_weight(ours[0]))


def test_int8_rows_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(3))
    stored = QUANTIZERS["int8"].pack(weight)
    places, scales, _ = functional.int8_vectorwise_quant(weight.clone())
    assert torch.equal(stored["weight"], places) and torch.equal(stored["SCB"], scales)


# --- on the way in --------------------------------------------------------------------------------


@EVERY
def test_on_the_way_in_it_is_as_in_memory(word):
    way = lorica.load_model("embedded", dtype="float32", quantize=word)
    memory = lorica.load_model("embedded", dtype="float32")
    paths = quantize_model(memory, word)
    assert [path for path, _ in quantized_layers(way)] == paths and len(paths) == 28
    assert same(way, memory)
    assert not hasattr(way, "hf_quantizer") and not hasattr(way.config, "quantization_config")
    base = base_of(way)
    assert base is not None and base.quantize == word and base.digest
    assert quantization_of(way) in base.notes[-1]


def test_norms_embeddings_and_head_stay(plain, nf4):
    left = {n: p for n, p in nf4.named_parameters() if p.is_floating_point()}
    wanted = {n for n, _ in plain.named_parameters()} - {f"{p}.weight" for p in quantizable(plain)}
    assert set(left) == wanted
    assert all(p.dtype == torch.float32 for p in left.values())


@EVERY
def test_saved_and_loaded_it_is_the_same_base(word, tmp_path):
    model = lorica.load_model("embedded", dtype="float32", quantize=word)
    save_base(model, tmp_path / "q")
    again = lorica.load_model(tmp_path / "q", dtype="float32")
    assert same(model, again)
    assert base_of(again).digest == base_of(model).digest
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(BaseModelError, match="exists"):
        save_base(model, tmp_path / "q")
    with pytest.raises(BaseModelError, match="quantized already"):
        lorica.load_model(tmp_path / "q", quantize="nf4")
    sizes = [f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors")]
    plain_bytes = 4 * num_parameters(model)
    assert sum(sizes) < plain_bytes * 0.6


def test_transformers_with_bitsandbytes_reads_the_folder(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    # rows are whole blocks, and the model trains: else, on processors with AVX-512, bitsandbytes
    # misreads them, and computes in bfloat16
    llama_of_width(128).save_pretrained(tmp_path / "plain")
    base_of(lorica.load_model("embedded")).tokenizer.save_pretrained(tmp_path / "plain")
    ours = lorica.load_model(tmp_path / "plain", dtype="float32", quantize="nf4")
    save_base(ours, tmp_path / "q")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q").train()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_folder_that_transformers_quantized_is_read(plain, nf4, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain.save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    base_of(plain).tokenizer.save_pretrained(tmp_path / "theirs")
    assert same(lorica.load_model(tmp_path / "theirs", dtype="float32"), nf4)


PEAK = """
import sys, threading, time
import lorica, lorica.base.load, transformers
from lorica.base.quantize import quantized_layers
lorica.load_model("embedded", dtype="float32", quantize="nf4")

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = lorica.load_model(sys.argv[1], dtype="float32", quantize="nf4")
stop.set(); thread.join()
held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())}
print(peak[0] - before, sum(held.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux has it")
def test_no_more_than_one_tensor_lies_in_memory_in_full(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=6, vocab_size=600,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    whole = 4 * num_parameters(model)
    model.bfloat16().save_pretrained(tmp_path)  # float32 would be read where the file is mapped
    base_of(lorica.load_model("embedded")).tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    # glibc would keep what is freed, between what is not: 20 to 45 MB of it, from run to run
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    peak, held = map(int, done.stdout.split()[-2:])
    largest = 4 * 768 * 2048
    room = 4 * 2**20  # the tokenizer, and small objects; less than one more tensor
    assert held < whole * 0.2
    # one in full, and its magnitudes, which torch makes to look for NaN
    assert peak <= held + 2 * largest + room < whole * 0.5, (peak, held, whole)


# --- bad input ------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named_and_nothing_changes():
    model = two_layers()
    model[2].weight.data[3, 4] = torch.nan
    with pytest.raises(BaseModelError, match="NaN") as caught:
        quantize_model(model, "nf4")
    assert "2" in str(caught.value.problems) and type(model[0]) is nn.Linear


def test_files_with_weights_that_are_not_finite_are_refused(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    base_of(plain).tokenizer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    state[key][0, 0] = torch.inf
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="NaN or infinite") as caught:
        lorica.load_model(tmp_path, dtype="float32", quantize="nf4")
    assert "model.layers.1.mlp.up_proj" in str(caught.value.problems)


@pytest.mark.parametrize("word", ["nf5", "gptq", ""])
def test_an_unknown_quantizer_is_named(word):
    with pytest.raises(BaseModelError, match=r"no quantizer"):
        lorica.load_model("embedded", quantize=word)


def test_settings_of_a_quantizer():
    assert quantizer_of("nf4", block_size=128) == NF4(128)
    with pytest.raises(BaseModelError, match="no setting bits"):
        quantizer_of("int8", bits=3)
    with pytest.raises(BaseModelError, match="block_size") as caught:
        quantize_model(two_layers(), NF4(block_size=7))
    assert "32, 64" in str(caught.value.problems)
    with pytest.raises(BaseModelError, match="no layer to quantize"):
        quantize_model(nn.Sequential(nn.LayerNorm(3)), "nf4")


def test_tied_and_shared_weights_are_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    assert list(quantizable(model)) == ["c"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, k: s.pop(f"{k}.absmax"), "absmax is missing"),
        (lambda s, k: s.__setitem__(k, s[k][:-4].clone()), "expected"),
        (lambda s, k: s[f"{k}.nested_absmax"].fill_(torch.nan), "not finite"),
        (lambda s, k: s.__setitem__(f"{k}.extra", torch.zeros(1)), "extra"),
        (
            lambda s, k: s.__setitem__(
                f"{k}.quant_state.bitsandbytes__nf4", torch.tensor([123, 1], dtype=torch.uint8)
            ),
            "no JSON",
        ),
    ],
    ids=["missing", "cut", "nan", "too much", "no json"],
)
def test_wrong_quantized_files_are_refused(change, said, nf4, tmp_path):
    save_base(nf4, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    state = load_file(file)
    change(state, "model.layers.0.mlp.up_proj.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError) as caught:
        lorica.load_model(tmp_path / "q", dtype="float32")
    assert said in str(caught.value)


def test_a_truncated_file_is_refused(nf4, tmp_path):
    save_base(nf4, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        lorica.load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("word", "said"),
    [("gptq", "not installed"), ("hqq", "not installed"), ("fp8", "not supported")],
)
def test_other_storages_say_what_is_missing(word, said, nf4, tmp_path):
    save_base(nf4, tmp_path / "q")
    file = tmp_path / "q" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": word}
    file.write_text(json.dumps(config))
    with pytest.raises(BaseModelError) as caught:
        lorica.load_model(tmp_path / "q")
    assert said in str(caught.value.problems) and word in str(caught.value.problems)


def test_a_save_that_fails_leaves_nothing(nf4, plain, tmp_path):
    with pytest.raises(BaseModelError, match="one quantizer"):
        save_base(plain, tmp_path / "q")
    lorica.attach(nf4, lorica.LoRA(r=2), name="x")
    try:
        with pytest.raises(BaseModelError, match="attached"):
            save_base(nf4, tmp_path / "q")
    finally:
        lorica.detach(nf4, "x")
    assert not (tmp_path / "q").exists()


def test_packed_bytes_do_not_depend_on_the_number_of_threads():
    """Torch splits the sum of many scales among its threads."""
    torch.manual_seed(0)
    weight = torch.randn(2048, 2048)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(NF4().pack(weight))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])

"""Files of other tools that are broken, of something else, or mean harm: one clear error each."""

import json
import pickle
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.base.image_pipeline import ImagePipeline
from lorica.errors import AdapterFileError, LoricaError
from lorica.files.adapter import load_adapter
from lorica.files.formats import FORMATS
from lorica.methods.lora import LoRA
from pipelines import PIPELINES


def llama():
    return ARCHITECTURES["llama"].build()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A LoRA of llama.cpp that is read."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    adapter = attach(llama(), LoRA(r=2, target_modules=("q_proj", "v_proj")))
    FORMATS["gguf"].write(adapter, path, "float32", False)
    return path


@pytest.fixture(scope="module")
def kohya(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kohya") / "x.safetensors"
    adapter = attach(ImagePipeline(PIPELINES["sd"]()), LoRA(r=2, target_modules="to_q"))
    FORMATS["kohya"].write(adapter, path, "float32", False)
    return path


def refused(model, path) -> AdapterFileError:
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(model, path)
    assert not adapters(model)
    return caught.value


def test_a_gguf_file_cut_short_anywhere(sound, tmp_path):
    raw, model = sound.read_bytes(), llama()
    assert load_adapter(llama(), sound).slots
    for length in [*range(4, 200, 7), *range(200, len(raw), len(raw) // 15), len(raw) - 1]:
        (tmp_path / "x.gguf").write_bytes(raw[:length])
        error = refused(model, tmp_path / "x.gguf")
        assert "GGUF" in error.what and len(str(error)) < 1000


def test_a_gguf_file_with_turned_bits(sound, tmp_path):
    """Whatever is read is read as an error of ours, or as other numbers; never as a crash."""
    raw, model = sound.read_bytes(), llama()
    generator = np.random.default_rng(0)
    refusals = 0
    for _ in range(60):
        broken = bytearray(raw)
        broken[int(generator.integers(4, 1200))] ^= 1 << int(generator.integers(0, 8))
        (tmp_path / "x.gguf").write_bytes(broken)
        try:
            load_adapter(model, tmp_path / "x.gguf", name=f"a{refusals}-{len(adapters(model))}")
        except LoricaError:
            refusals += 1
    assert refusals > 20


def rewritten(path: Path, *, alpha=4.0, arch="llama", kind="adapter", change=dict) -> Path:
    """A LoRA for llama.cpp with one thing wrong."""
    tensors = {
        f"blk.{i}.attn_v.weight.lora_{part}": np.ones(shape, np.float32)
        for i in (0, 1)
        for part, shape in (("a", (2, 36)), ("b", (12, 2)))
    }
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in {**tensors, **change()}.items():
        if tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


V = "blk.0.attn_v.weight.lora_"
CASES = {
    "no alpha": ({"alpha": None}, "adapter.lora.alpha is None"),
    "alpha zero": ({"alpha": 0.0}, "adapter.lora.alpha is 0.0"),
    "a model": ({"kind": "model"}, "of a model, not of an adapter"),
    "another base": ({"arch": "gpt2"}, "for a base of gpt2"),
    "half a pair": ({"change": lambda: {f"{V}b": None}}, "lora_a alone"),
    "another width": ({"change": lambda: {f"{V}a": np.ones((2, 35), np.float32)}}, "(2, 35)"),
    "other ranks": ({"change": lambda: {f"{V}a": np.ones((3, 36), np.float32)}}, "the base needs"),
    "no such layer": (
        {"change": lambda: {"blk.7.attn_v.weight.lora_a": np.ones((2, 36), np.float32)}},
        "blk.7.attn_v.weight.lora_a: LlamaForCausalLM has no such weight",
    ),
    "a norm": (
        {"change": lambda: {"blk.0.attn_norm.weight": np.ones(36, np.float32)}},
        "no factor of LoRA",
    ),
    "not finite": (
        {"change": lambda: {f"{V}a": np.full((2, 36), np.nan, np.float32)}},
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_in_one_thing(case, tmp_path):
    assert len(load_adapter(llama(), rewritten(tmp_path / "ok.gguf")).slots) == 2
    arguments, words = CASES[case]
    error = refused(llama(), rewritten(tmp_path / "x.gguf", **arguments))
    assert words in str(error)


def test_a_gguf_header_that_promises_too_much(sound, tmp_path):
    raw = bytearray(sound.read_bytes())
    raw[8:16] = struct.pack("<Q", 2**60)
    (tmp_path / "x.gguf").write_bytes(raw)
    assert "1,152,921,504,606,846,976 tensors" in refused(llama(), tmp_path / "x.gguf").what


def test_a_name_twice(tmp_path):
    path = rewritten(tmp_path / "x.gguf")
    raw = path.read_bytes().replace(b"blk.1.attn_v.weight.lora_a", b"blk.0.attn_v.weight.lora_a")
    path.write_bytes(raw)
    assert "not a sound GGUF file" in refused(llama(), path).what


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
def test_pickles_are_refused_unread(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pickle.dumps({"a": 1}))
    error = refused(llama(), path)
    assert "is a pickle" in error.what and error.mend and "safetensors" in error.mend


def test_adapterhubs_pickle_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "pytorch_adapter.bin").write_bytes(pickle.dumps({}))
    error = refused(llama(), tmp_path)
    assert "is a pickle" in error.what and "use_safetensors=True" in str(error)


def test_image_adapters_say_what_they_are_for(kohya):
    assert "text-to-image pipeline" in refused(llama(), kohya).what


def changed(kohya: Path, tmp_path: Path, change) -> Path:
    tensors = load_file(kohya)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


FIRST = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
BROKEN = {
    "half": (lambda t: t.pop(f"{FIRST}.lora_up.weight"), "lora_down or lora_up is missing"),
    "unknown": (
        lambda t: t.update({"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}),
        "lora_unet_nowhere.lora_up.weight: the model has no such layer",
    ),
    "tucker": (
        lambda t: t.update({f"{FIRST}.lora_mid.weight": torch.ones(2, 2)}),
        "a part of a method that is not read",
    ),
    "shapes": (
        lambda t: t.update({f"{FIRST}.lora_up.weight": torch.ones(5, 2)}),
        "but the base needs",
    ),
    "two names": (
        lambda t: t.update(
            {
                "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(
                    32, 2
                ),
                "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(
                    32, 2
                ),
            }
        ),
        "the same layer under two names",
    ),
    "mixed": (
        lambda t: t.update({f"{FIRST}.hada_w1_a": torch.ones(2, 2)}),
        "are mixed in one file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_kohya_files_that_do_not_fit(case, kohya, tmp_path):
    change, words = BROKEN[case]
    error = refused(ImagePipeline(PIPELINES["sd"]()), changed(kohya, tmp_path, change))
    assert words in str(error)


def test_kohya_without_alpha_has_the_scale_one(kohya, tmp_path):
    path = changed(kohya, tmp_path, lambda t: [t.pop(k) for k in [*t] if k.endswith(".alpha")])
    loaded = load_adapter(ImagePipeline(PIPELINES["sd"]()), path)
    assert loaded.method.lora_alpha == loaded.method.r == 2  # type: ignore[attr-defined]


def test_mlx_without_a_scale(tmp_path):
    adapter = attach(llama(), LoRA(r=2, target_modules="q_proj"))
    FORMATS["mlx"].write(adapter, tmp_path / "x", "float32", False)
    file = tmp_path / "x" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["alpha"] = config["lora_parameters"].pop("scale")
    file.write_text(json.dumps(config))
    assert "lora_parameters.scale is None" in refused(llama(), tmp_path / "x").what


def test_an_unknown_file_is_told_by_name(tmp_path):
    save_file({"text_encoder:0:down": torch.ones(2)}, tmp_path / "x.safetensors")
    error = refused(llama(), tmp_path / "x.safetensors")
    assert "in no format of an adapter that is known here" in error.what
    assert "text_encoder:0:down" in str(error) and "kohya" in str(error)

"""`export` and `convert`: adapters and models for other tools."""

import json

import gguf
import pytest
import torch

from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.base.load import load_model
from lorica.cli.convert import command as convert
from lorica.cli.export import command as export
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.exports import ADAPTERS, MODELS
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.lora import LoRA
from pipelines import PIPELINES

IDS = torch.tensor([[1, 67, 272, 90]])


def answer(model, adapter) -> torch.Tensor:
    with torch.no_grad(), activate(model, adapter):
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path):
    """An adapter of the embedded base, and what it answers."""
    model = load_model("embedded", dtype="float32")
    adapter = attach(model, LoRA(r=2, target_modules=("q_proj", "up_proj")))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    save_adapter(adapter, tmp_path / "adapter")
    return tmp_path / "adapter", answer(model, adapter)


def test_help_names_every_format():
    for command, known in ((export, {**ADAPTERS, **MODELS}), (convert, ADAPTERS)):
        text = command.__annotations__["format"]
        for name in known:
            assert name in text.replace(";", ",").replace(":", ","), name


def test_there_and_back(lorica, folder):
    source, expected = folder
    assert lorica("export", source, "--format", "gguf", "--output", "x.gguf").code == 0
    told = lorica("convert", "x.gguf", "own", "--model", "embedded", "--json")
    assert told.rows == [{"path": "own", "format": "lorica", "dtype": "float32", "notes": []}]
    model = load_model("embedded", dtype="float32")
    found = answer(model, load_adapter(model, "own"))
    assert (found - expected).abs().max() < 1e-5
    assert lorica("convert", "own", "mlx", "--format", "mlx").code == 0
    assert lorica("convert", "mlx", "peft", "--format", "peft", "--model", "embedded").code == 0
    assert json.loads((source.parent / "peft" / "adapter_config.json").read_text())["r"] == 2


def test_a_merged_model_as_gguf(lorica, folder):
    source, _ = folder
    told = lorica(
        "export", source, "--format", "gguf-model", "--output", "m.gguf", "--dtype", "q8_0"
    )
    assert told.code == 0 and told.out.splitlines()[-1] == "gguf-model  m.gguf"
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader("m.gguf").tensors}
    assert "Q8_0" in kinds and "F32" in kinds
    again = lorica("export", source, "--format", "gguf-model", "--output", "m.gguf")
    assert again.code == 2 and "exists already" in again.err and "--overwrite" in again.err


def test_what_is_wrong_is_told_before_anything_is_loaded(lorica, folder):
    source, _ = folder
    told = lorica("export", source, "--format", "gguff", "--output", "x")
    assert told.code == 2 and "there is no format 'gguff'" in told.err and "gguf" in told.err
    told = lorica("convert", source, "x", "--format", "onnx")
    assert told.code == 2 and "there is no format 'onnx'" in told.err
    told = lorica("export", source, "--format", "gguf", "--output", "x", "--dtype", "q8_0")
    assert told.code == 2 and "gguf is not written in q8_0" in told.err
    told = lorica("convert", "nowhere", "x")
    assert told.code == 2 and "there is no nowhere" in told.err
    lorica("export", source, "--format", "gguf", "--output", "x.gguf")
    told = lorica("convert", "x.gguf", "x")
    assert told.code == 2 and "name the base with --model" in told.err


def test_a_method_without_a_place_is_refused(lorica, tmp_path):
    model = load_model("embedded", dtype="float32")
    save_adapter(attach(model, Bottleneck()), tmp_path / "b")
    told = lorica("export", "b", "--format", "gguf", "--output", "x.gguf")
    assert told.code == 2 and "bottleneck is no product of two factors" in told.err
    assert not (tmp_path / "x.gguf").exists()


def test_adapters_of_a_pipeline(lorica, tmp_path):
    """A UNet and its text encoder in a folder of diffusers."""
    from lorica.base.image_pipeline import ImagePipeline

    pipeline = PIPELINES["sd"]()
    adapter = attach(ImagePipeline(pipeline), LoRA(r=2, target_modules=("to_q", "q_proj")))
    save_adapter(adapter, tmp_path / "own")
    pipeline.save_pretrained(tmp_path / "base")
    told = lorica(
        "export", "own", "--format", "kohya", "--output", "x.safetensors", "--model", "base"
    )
    assert told.code == 0, told.err
    told = lorica("convert", "x.safetensors", "back", "--format", "diffusers", "--model", "base")
    assert told.code == 0, told.err
    assert (tmp_path / "back" / "pytorch_lora_weights.safetensors").is_file()

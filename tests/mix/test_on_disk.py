"""Merging from disk to disk writes what merging in memory would, and never holds the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.base.empty import empty_model
from lorica.errors import MergeError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import METHODS, LoRA
from lorica.methods.method import Method
from lorica.mix import merge
from lorica.mix.on_disk import merge_on_disk, plan_on_disk

METHOD = LoRA(r=3, lora_alpha=5, target_modules="all-linear")


def saved(name: str, folder: Path, method: Method, size: float = 0.1, **how):
    """A base in a folder and an adapter beside it; returns the model with the adapter."""
    model = ARCHITECTURES[name].build()
    model.save_pretrained(folder / "base", **how)
    adapter = attach(model, method, name="a")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    save_adapter(adapter, folder / "adapter")
    return model


def planned(folder: Path, task: str = "causal-lm", weight: float = 1.0, **how):
    model = empty_model(folder / "base", task=task)
    load_adapter(model, folder / "adapter", name="a")
    files = sorted((folder / "base").glob("*.safetensors"))
    return plan_on_disk(model, {"a": weight}, files, **how)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


CASES = {
    "lora": ("llama", METHOD),
    "gpt2's transposed weights": ("gpt2", METHOD),
    "dora": ("llama", METHODS["dora"](target_modules="all-linear")),
    "ia3": ("llama", METHODS["ia3"]()),
    "hira": ("llama", METHODS["hira"](r=4)),
    "whole norms": ("llama", LoRA(r=2, target_modules="mlp", modules_to_save=("norm",))),
    "tied ends": ("llama-tied", LoRA(r=3, target_modules=("embed_tokens", "q_proj"))),
    "the tied head": ("llama-tied", LoRA(r=3, target_modules=("lm_head", "q_proj"))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_in_memory(case, tmp_path):
    name, method = CASES[case]
    model = saved(name, tmp_path, method)
    plan = planned(tmp_path)
    assert not isinstance(plan, str), plan
    (tmp_path / "new").mkdir()
    report = merge_on_disk(plan, tmp_path / "new")
    in_memory = merge(model, "a")
    assert report.merged == in_memory.merged and report.untied == in_memory.untied
    found, wanted = tensors(tmp_path / "new"), model.state_dict()
    for key, tensor in found.items():
        assert torch.equal(tensor, wanted[key]), key
    missing = set(wanted) - set(found)
    assert missing == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert all(p.is_meta for p in plan.model.parameters()) and "a" in adapters(plan.model)


def test_shards_stay_shards(tmp_path):
    model = saved("llama", tmp_path, METHOD, max_shard_size="20KB")
    files = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2
    plan = planned(tmp_path)
    assert not isinstance(plan, str)
    (tmp_path / "new").mkdir()
    merge_on_disk(plan, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").glob("*.safetensors")) == files
    merge(model, "a")
    hf.AutoConfig.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "new")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


@pytest.mark.filterwarnings("ignore:rounding destroyed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision(dtype, tmp_path):
    model = saved("llama", tmp_path, METHOD)
    plan = planned(tmp_path, dtype=dtype)
    assert not isinstance(plan, str)
    (tmp_path / "new").mkdir()
    report = merge_on_disk(plan, tmp_path / "new", force=True)
    merge(model.to(dtype), "a", force=True)
    for key, tensor in tensors(tmp_path / "new").items():
        assert tensor.dtype == dtype and torch.equal(tensor, model.state_dict()[key])
    assert report.damage > 0


def test_a_bare_stack_of_layers_becomes_a_classifier(tmp_path):
    """Its files name tensors without the prefix, and have no head, which the adapter brings."""
    method = LoRA(r=2, target_modules="attention", modules_to_save=("classifier",))
    model = saved("bert", tmp_path, method)
    model.bert.save_pretrained(tmp_path / "base")
    plan = planned(tmp_path, task="text-classification")
    if isinstance(plan, str):  # the pooler of a bare stack is another one
        assert "otherwise than the model" in plan
        return
    (tmp_path / "new").mkdir()
    merge_on_disk(plan, tmp_path / "new")
    merge(model, "a")
    for key, tensor in tensors(tmp_path / "new").items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_experts_in_other_tensors_are_left_to_memory(tmp_path):
    saved("mixtral", tmp_path, METHOD)
    plan = planned(tmp_path)
    assert isinstance(plan, str) and "tensor" in plan


def test_what_drowns_in_rounding_is_refused(tmp_path):
    saved("llama", tmp_path, METHOD, size=1e-4)
    plan = planned(tmp_path, dtype=torch.bfloat16)
    assert not isinstance(plan, str)
    (tmp_path / "new").mkdir()
    with pytest.raises(MergeError, match="rounding would destroy"):
        merge_on_disk(plan, tmp_path / "new")


PEAK = """
import resource, sys, json, torch, transformers as hf
from pathlib import Path
from lorica.attach.attach import attach
from lorica.base.empty import empty_model
from lorica.methods import LoRA
from lorica.mix.on_disk import merge_on_disk, plan_on_disk

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

folder, layers = Path(sys.argv[1]), int(sys.argv[2])
config = hf.LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=1024,
    num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
(folder / "base").mkdir()
config.save_pretrained(folder / "base")
model = empty_model(folder / "base")
attach(model, LoRA(r=2, target_modules="all-linear", init_lora_weights="random"), name="a")
plan = plan_on_disk(model, {"a": 1.0}, [folder / "model.safetensors"])
(folder / "new").mkdir()
before = peak()
merge_on_disk(plan, folder / "new")
print(json.dumps({"more": peak() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Four times as many layers, and the merge needs no more beside what the process had."""
    more = {}
    for layers in (8, 32):
        folder = tmp_path / str(layers)
        folder.mkdir()
        config = hf.LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
        size = sum(p.numel() * 4 for p in model.parameters())
        model.save_pretrained(folder)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), str(layers)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        more[layers] = json.loads(done.stdout.splitlines()[-1])["more"], size
        assert (folder / "new" / "model.safetensors").stat().st_size > size
    (small, _), (large, size) = more[8], more[32]
    assert large < size / 2 and large < small + 0.1 * size, more

import json
import stat

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.errors import BaseModelError
from lorica.files.whole import save_merged
from lorica.methods.lora import LoRA
from lorica.mix import merge

AUTO = {
    "llama": hf.AutoModelForCausalLM,
    "gpt2": hf.AutoModelForCausalLM,
    "gemma": hf.AutoModelForCausalLM,
    "mixtral": hf.AutoModelForCausalLM,
    "bert": hf.AutoModelForSequenceClassification,
    "bart": hf.AutoModelForSeq2SeqLM,
    "vit": hf.AutoModelForImageClassification,
}


def answer(name: str, model: nn.Module) -> torch.Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(model, 2, 7)))


@pytest.mark.parametrize("name", AUTO)
def test_plain_transformers_loads_it_with_the_same_answers(name, tmp_path):
    model = ARCHITECTURES[name].build()
    adapter = attach(model, LoRA(r=3, target_modules="all-linear", init_lora_weights="random"))
    with activate(model, adapter):
        attached = answer(name, model)
    merge(model, adapter)
    merged = answer(name, model)
    torch.testing.assert_close(merged, attached, atol=1e-5, rtol=1e-5)
    folder = save_merged(model, tmp_path / "whole")
    again = AUTO[name].from_pretrained(folder).eval()
    assert torch.equal(answer(name, again), merged)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_bits(dtype, tmp_path):
    model = ARCHITECTURES["llama"].build().to(dtype)
    merge(model, attach(model, LoRA(r=3, target_modules="mlp", init_lora_weights="random")))
    save_merged(model, tmp_path / "x")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert again.dtype == dtype
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)


def test_the_folder_of_the_base_is_not_touched(tmp_path):
    base = ARCHITECTURES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merge(model, attach(model, LoRA(r=3, target_modules="mlp", init_lora_weights="random")))
    save_merged(model, tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    with pytest.raises(BaseModelError, match="folder of the base"):
        save_merged(model, tmp_path / "base", overwrite=True)
    with pytest.raises(BaseModelError, match="exists already"):
        save_merged(model, tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = ARCHITECTURES["llama"].build()
    attach(model, LoRA(target_modules="mlp"))
    with pytest.raises(BaseModelError, match="adapters are attached"):
        save_merged(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    detach(model, "default")
    assert (save_merged(model, tmp_path / "x") / "config.json").exists()


def test_any_module_is_written_as_its_state(tmp_path):
    model = ARCHITECTURES["cnn"].build()
    merge(
        model, attach(model, LoRA(r=3, target_modules=("conv1", "fc2"), init_lora_weights="random"))
    )
    save_merged(model, tmp_path / "x")
    state = load_file(tmp_path / "x" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    save_merged(model, tmp_path / "x", overwrite=True)


def test_the_tokenizer_goes_along(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "t"}))

    save_merged(ARCHITECTURES["llama"].build(), tmp_path / "x", Tokenizer())
    assert json.loads((tmp_path / "x" / "tokenizer_config.json").read_text()) == {
        "chat_template": "t"
    }

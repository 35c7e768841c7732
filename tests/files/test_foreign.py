"""Formats of other tools, written and read; against the tools where they are installed."""

import importlib.util
import json
import re
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.base.load import load_model
from lorica.base.locate import EMBEDDED
from lorica.errors import AdapterFileError
from lorica.files import gguf_model, gguf_vocab, ollama, onnx_model
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.exports import ADAPTERS, write_adapter
from lorica.files.formats import FORMATS
from lorica.files.gguf_names import to_halves, to_pairs
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.vera import VeRA

HUB = Path(__file__).parent / "adapterhub"
GGUF_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt2")
UNEVEN = LoRA(
    r=3,
    lora_alpha=5,
    target_modules="all-linear",
    rank_pattern={"0.*": 2},
    alpha_pattern={"1.*": 2},
)


def stirred(model: nn.Module, method, strength: float = 0.2):
    adapter = attach(model, method)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=strength)
    return adapter


def build(name: str) -> nn.Module:
    return ARCHITECTURES[name].build()


def answer(name: str, model: nn.Module, adapter) -> torch.Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad(), activate(model, adapter):
        return arch.logits(model(**arch.sample(model, 2, 6)))


def uneven(name: str) -> LoRA:
    first = next(
        p for p, m in build(name).named_modules() if re.search(r"\.0\.", p) and not [*m.children()]
    )
    stem = first.partition(".0.")[0]
    return LoRA(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        rank_pattern={f"{stem}.0.*": 2},
        alpha_pattern={f"{stem}.1.*": 2},
    )


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_comes_back(name, tmp_path):
    """Also of layers with other ranks and scales: the file has one alpha."""
    model = build(name)
    adapter = stirred(model, uneven(name))
    expected = answer(name, model, adapter)
    notes = FORMATS["gguf"].write(adapter, tmp_path / "x.gguf", "float32", False)
    assert "the file has one lora_alpha" in notes[0]
    again = build(name)
    loaded = load_adapter(again, tmp_path / "x.gguf")
    assert set(loaded.slots) == set(adapter.slots)
    assert (answer(name, again, loaded) - expected).abs().max() < 1e-5
    save_adapter(loaded, tmp_path / "own")
    third = build(name)
    own = load_adapter(third, tmp_path / "own")
    assert torch.equal(answer(name, third, own), answer(name, again, loaded))


def test_gguf_has_llama_cpps_names_and_order(tmp_path):
    model = build("llama")
    adapter = stirred(
        model, LoRA(r=2, lora_alpha=6, target_modules=("q_proj", "k_proj", "up_proj"))
    )
    FORMATS["gguf"].write(adapter, tmp_path / "x.gguf", "float32", False)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 6.0
    held = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_up": "mlp.up_proj"}
    assert set(held) == {
        f"blk.{i}.{short}.weight.lora_{part}" for i in (0, 1) for short in names for part in "ab"
    }
    slots = {
        short: adapter.slots[f"model.layers.1.{path}"].tensors for short, path in names.items()
    }
    for short, tensors in slots.items():
        assert torch.equal(held[f"blk.1.{short}.weight.lora_a"], tensors["A"])
    assert torch.equal(held["blk.1.ffn_up.weight.lora_b"], slots["ffn_up"]["B"])
    B, heads = slots["attn_q"]["B"], model.config.num_attention_heads
    size = B.shape[0] // heads
    rotated = [
        h * size + i + j * size // 2 for h in range(heads) for i in range(size // 2) for j in (0, 1)
    ]
    assert torch.equal(held["blk.1.attn_q.weight.lora_b"], B[rotated])
    assert torch.equal(to_halves(to_pairs(B, heads), heads), B)


def test_gguf_refuses_what_llama_cpp_cannot_hold(tmp_path):
    cases = {
        "DoRA": ("llama", DoRA(r=2, target_modules="q_proj"), "no place for DoRA's lengths"),
        "copies": (
            "llama",
            LoRA(r=2, target_modules="q_proj", modules_to_save="norm"),
            "trained whole",
        ),
        "tied": ("gpt2", LoRA(r=2, target_modules="wte"), "shares its weight"),
        "other": ("llama", VeRA(r=2, target_modules="q_proj"), "no product of two factors"),
    }
    for name, method, words in cases.values():
        adapter = attach(build(name), method)
        with pytest.raises(AdapterFileError) as caught:
            FORMATS["gguf"].write(adapter, tmp_path / "x.gguf", "float32", False)
        assert any(words in problem for problem in caught.value.problems)
    adapter = attach(build("bert"), LoRA(r=2, target_modules="query"))
    with pytest.raises(AdapterFileError, match="GGUF is not written for bert"):
        FORMATS["gguf"].write(adapter, tmp_path / "x.gguf", "float32", False)
    assert not list(tmp_path.iterdir())


def test_the_name_in_gguf_says_phi3_where_the_tokenizer_is_one():
    """llama.cpp takes the handling of special tokens from the name, and dies of lacking ones."""
    tokenizer = load_model("embedded").__dict__["_lorica_base"].tokenizer
    assert gguf_vocab.model_name("my-phi-3-mini", tokenizer) == "my-model-mini"
    assert gguf_vocab.model_name("My-Phi3", tokenizer) == "My-model", "it reads small letters"
    tokenizer.add_special_tokens({"unk_token": "<unk>", "pad_token": "<|endoftext|>"})
    assert gguf_vocab.model_name("x", tokenizer) == "x"
    end = AddedToken("</s>", rstrip=True, special=True)
    tokenizer.add_special_tokens({"eos_token": end})
    assert gguf_vocab.model_name("x", tokenizer) == "phi3 x"
    assert gguf_vocab.model_name("Phi-3-mini", tokenizer) == "Phi-3-mini"


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_a_whole_model_as_gguf(dtype, tmp_path):
    model = load_model("embedded", dtype="float32")
    tokenizer = model.__dict__["_lorica_base"].tokenizer
    gguf_model.write(model, tokenizer, tmp_path / "x.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = model.config
    assert fields["llama.block_count"] == config.num_hidden_layers
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert len(fields["tokenizer.ggml.tokens"]) == config.vocab_size
    held = {tensor.name: tensor for tensor in reader.tensors}
    up = held["blk.0.ffn_up.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    values = torch.tensor(gguf.quants.dequantize(up.data, up.tensor_type))
    tolerance = {"float32": 0, "float16": 1e-3, "q8_0": 1e-2}[dtype]
    assert up.tensor_type.name == {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}[dtype]
    assert (values - weight).abs().max() <= tolerance * weight.abs().max()
    assert held["output_norm.weight"].tensor_type.name == "F32"
    assert ("output.weight" in held) is not config.tie_word_embeddings


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    from tokenizers import Tokenizer

    model = load_model("embedded", dtype="float32")
    tokenizer = model.__dict__["_lorica_base"].tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\W"}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(AdapterFileError, match="cuts text as this one") as caught:
        gguf_model.write(model, tokenizer, tmp_path / "x.gguf", "float16")
    assert r"it cuts by \w+|\W" in caught.value.problems
    assert not list(tmp_path.iterdir())


def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path):
    model = build("llama")
    model.config.hidden_act = "relu"
    with pytest.raises(AdapterFileError) as caught:
        gguf_model.write(model, None, tmp_path / "x.gguf", "float16")
    assert caught.value.problems == ("its feed-forward has relu; llama.cpp has silu for llama",)


# --- llama.cpp itself -----------------------------------------------------------------------------


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_llama_cpp_says_the_same(tmp_path):
    """Base and adapter, and the merged model, in llama.cpp: the same tokens, the same text."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed; it is built from source, for minutes")
    from llama_cpp import Llama

    model = load_model("embedded", dtype="float32")
    tokenizer = model.__dict__["_lorica_base"].tokenizer
    prompt = "Once upon a time, there were 12 birds  and 3\n\n cats."
    ids = tokenizer(prompt)["input_ids"]
    gguf_model.write(model, tokenizer, tmp_path / "base.gguf", "float32")
    adapter = stirred(model, LoRA(r=4, lora_alpha=6, target_modules="all-linear"), 0.1)
    FORMATS["gguf"].write(adapter, tmp_path / "lora.gguf", "float32", False)
    with activate(model, adapter):
        expected = greedy(model, ids, 24)
    assert expected != greedy(model, ids, 24)
    other = Llama(str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "lora.gguf"), verbose=False)
    assert other.tokenize(prompt.encode(), add_bos=True) == ids
    told = ids + [
        t
        for t, _ in zip(other.generate(ids, temp=0.0, repeat_penalty=1.0), range(24), strict=False)
    ]
    assert told == expected


# --- others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [UNEVEN, DoRA(r=2, target_modules="all-linear")])
def test_mlx_comes_back(method, tmp_path):
    model = build("llama")
    adapter = stirred(model, uneven("llama") if method is UNEVEN else method)
    expected = answer("llama", model, adapter)
    notes = FORMATS["mlx"].write(adapter, tmp_path / "x", "float32", False)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == ("lora" if method is UNEVEN else "dora")
    assert config["num_layers"] == 2 and "self_attn.q_proj" in config["lora_parameters"]["keys"]
    held = load_file(tmp_path / "x" / "adapters.safetensors")
    rank = config["lora_parameters"]["rank"]
    assert held["model.layers.0.mlp.up_proj.lora_a"].shape == (model.config.hidden_size, rank)
    assert ("mlx-lm has one rank" in "".join(notes)) is (method is UNEVEN)
    again = build("llama")
    loaded = load_adapter(again, tmp_path / "x")
    assert (answer("llama", again, loaded) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_vllm_gets_one_rank_and_scale_that_peft_reads(tmp_path):
    from peft import PeftModel

    model = build("llama")
    adapter = stirred(model, uneven("llama"))
    expected = answer("llama", model, adapter)
    notes = FORMATS["vllm"].write(adapter, tmp_path / "x", "float32", False)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert "rank_pattern" not in config and config["r"] == 3
    assert "--max-lora-rank 8" in notes[-1] and len(notes) == 3
    theirs = PeftModel.from_pretrained(build("llama"), tmp_path / "x")
    arch = ARCHITECTURES["llama"]
    with torch.no_grad():
        found = arch.logits(theirs(**arch.sample(model, 2, 6)))
    assert (found - expected).abs().max() < 1e-5
    with pytest.raises(AdapterFileError, match="output layer"):
        FORMATS["vllm"].write(
            attach(build("llama"), LoRA(r=2, target_modules="lm_head")),
            tmp_path / "y",
            "float32",
            False,
        )


def test_onnx_agrees(tmp_path):
    notes = onnx_model.write(build("llama"), None, tmp_path / "x", "float32")
    assert "onnxruntime agrees" in notes[0]
    assert (tmp_path / "x" / "model.onnx").is_file()


def test_a_modelfile_names_the_model(tmp_path):
    model = load_model(EMBEDDED, dtype="float32")
    tokenizer = model.__dict__["_lorica_base"].tokenizer
    notes = ollama.write(model, tokenizer, tmp_path / "x", "q8_0")
    lines = (tmp_path / "x" / "Modelfile").read_text().splitlines()
    assert lines == ["FROM ./model.gguf", f'PARAMETER stop "{tokenizer.eos_token}"']
    assert (tmp_path / "x" / "model.gguf").is_file() and "ollama create" in notes[-1]


# --- AdapterHub, by files that its package wrote --------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    file = Path(__file__).parents[2] / "scripts" / "adapterhub_fixtures.py"
    spec = importlib.util.spec_from_file_location("adapterhub_fixtures", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["lora", "lora-left-out", "houlsby", "pfeiffer-before-norm"])
def test_adapterhub_is_read_and_written_again(name, hub, tmp_path):
    model = hub.base()
    adapter = load_adapter(model, HUB / name, name="x")
    with activate(model, adapter):
        found = hub.answer(model)
    expected = load_file(HUB / name / "answer.safetensors")["logits"]
    assert (found - expected).abs().max() < 1e-5 < (expected - hub.answer(model)).abs().max()
    FORMATS["adapterhub"].write(adapter, tmp_path / "x", "float32", False)
    file = "adapter.safetensors"
    ours, theirs = load_file(tmp_path / "x" / file), load_file(HUB / name / file)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    written, given = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "x", HUB / name)
    )
    assert written == given


def test_adapterhubs_other_place_of_the_bottleneck_is_refused(hub):
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(hub.base(), HUB / "pfeiffer")
    assert caught.value.problems == ("original_ln_before is True; only False is read",)


def test_adapterhub_refuses_layers_that_differ(hub, tmp_path):
    places = ("layer.0.attention.self.query", "layer.1.attention.self.key")
    adapter = attach(hub.base(), LoRA(r=2, target_modules=places))
    with pytest.raises(AdapterFileError) as caught:
        FORMATS["adapterhub"].write(adapter, tmp_path / "x", "float32", False)
    assert "layers differ in what is adapted" in caught.value.problems[0]


def test_peft_is_refused_where_it_has_no_such_method(tmp_path):
    adapter = attach(build("bert"), Bottleneck())
    with pytest.raises(AdapterFileError, match="PEFT has no bottleneck"):
        write_adapter(adapter, "peft", tmp_path / "x", "float32")
    assert write_adapter(adapter, "lorica", tmp_path / "x", "float32") == []


def test_every_format_refuses_what_is_there(tmp_path):
    adapter = attach(build("llama"), LoRA(r=2, target_modules="q_proj"))
    for name in ("peft", "gguf", "mlx", "vllm"):
        path = tmp_path / f"{name}{ADAPTERS[name].suffix}"
        write_adapter(adapter, name, path, "float32")
        with pytest.raises(AdapterFileError, match="exists"):
            write_adapter(adapter, name, path, "float32")
        write_adapter(adapter, name, path, "float32", overwrite=True)

"""Adapter folders written and read by Lorica alone; the same against PEFT is in tests/parity."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.attach.handle import adapters
from lorica.base.known import Base
from lorica.errors import AdapterFileError, ConfigError, LoricaWarning
from lorica.files.adapter import CARD, CONFIG, PROVENANCE, WEIGHTS, load_adapter, save_adapter
from lorica.methods.lora import LoRA

FILES = (CONFIG, WEIGHTS, CARD, PROVENANCE)


def stirred(model: nn.Module, method: LoRA, name: str = "default"):
    adapter = attach(model, method, name=name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return adapter


def llama(**base: str) -> nn.Module:
    model = ARCHITECTURES["llama"].build()
    if base:
        model.__dict__["_lorica_base"] = Base(
            base["name"], base.get("task", "causal-lm"), base.get("digest", "")
        )
    return model


def answer(name: str, model: nn.Module) -> torch.Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(model, 2, 6)))


@pytest.mark.filterwarnings("ignore:PEFT's layout cannot name")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_loaded_and_saved_again(name, tmp_path):
    """The same bytes, the same answer bit for bit, the same places in the same order."""
    model = ARCHITECTURES[name].build()
    adapter = stirred(model, LoRA(r=3, lora_alpha=5.5, target_modules="all-linear"))
    with activate(model, adapter):
        expected = answer(name, model)
    save_adapter(adapter, tmp_path / "1")
    again = ARCHITECTURES[name].build()
    loaded = load_adapter(again, tmp_path / "1")
    assert list(loaded.slots) == list(adapter.slots)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in adapter.named_parameters()]
    with activate(again, loaded):
        assert torch.equal(answer(name, again), expected)
    save_adapter(loaded, tmp_path / "2")
    for file in FILES:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


SETTINGS = {
    "everything": (
        "bert",
        LoRA(
            r=4,
            lora_alpha=3,
            lora_dropout=0.1,
            target_modules="all-linear",
            exclude_modules=("layer.0.attention.self.key",),
            rank_pattern={"layer.1.*.dense": 2, "query": 5},
            alpha_pattern={"value": 0.5},
            use_rslora=True,
            modules_to_save=("classifier", "pooler"),
            init_lora_weights="gaussian",
        ),
    ),
    "embedding": ("gpt2", LoRA(r=2, target_modules=("wte", "lm_head", "c_attn"))),
    "layers": ("qwen2", LoRA(r=2, target_modules="mlp", layers_to_transform=(1,))),
    "convolutions": ("cnn", LoRA(r=3, target_modules=("conv1", "conv2", "conv3", "embedding"))),
    "experts": (
        "mixtral",
        LoRA(r=2, target_modules=("down_proj",), rank_pattern={"1.mlp.experts.down_proj": 5}),
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_come_back(case, tmp_path):
    name, method = SETTINGS[case]
    model = ARCHITECTURES[name].build()
    adapter = stirred(model, method)
    with activate(model, adapter):
        expected = answer(name, model)
    save_adapter(adapter, tmp_path / "1")
    again = ARCHITECTURES[name].build()
    loaded = load_adapter(again, tmp_path / "1")
    for field in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
    ):
        wanted = getattr(method, field)
        found = getattr(loaded.method, field)
        assert (sorted(found) if field == "modules_to_save" else found) == (
            sorted(wanted) if field == "modules_to_save" else wanted
        )
    for path, slot in adapter.slots.items():
        kinds = {type(slot.method), type(loaded.slots[path].method)}
        assert len(kinds) == 1
        if isinstance(slot.method, LoRA):
            assert slot.method.scale == loaded.slots[path].method.scale
    with activate(again, loaded):
        assert torch.equal(answer(name, again), expected)
    save_adapter(loaded, tmp_path / "2")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_the_settings_of_a_file_make_the_same_adapter_again(tmp_path):
    """What a loaded adapter says of itself can be given to `attach`."""
    adapter = attach(
        llama(), LoRA(r=3, target_modules="attention", rank_pattern={"0.self_attn.q_proj": 2})
    )
    save_adapter(adapter, tmp_path / "x")
    loaded = load_adapter(llama(), tmp_path / "x")
    fresh = attach(llama(), loaded.method)
    shapes = {name: tensor.shape for name, tensor in adapter.named_parameters()}
    assert {name: tensor.shape for name, tensor in fresh.named_parameters()} == shapes


def test_names_in_the_config_are_short_and_exact(tmp_path):
    save_adapter(attach(llama(), LoRA(target_modules="all-linear")), tmp_path / "1")
    config = json.loads((tmp_path / "1" / CONFIG).read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    save_adapter(
        attach(llama(), LoRA(target_modules="q_proj", layers_to_transform=1)), tmp_path / "2"
    )
    config = json.loads((tmp_path / "2" / CONFIG).read_text())
    assert config["target_modules"] == ["1.self_attn.q_proj"] and config["inference_mode"] is True


def test_two_adapters_beside_each_other(tmp_path):
    model = llama()
    one = stirred(model, LoRA(r=2, target_modules="attention"), "one")
    save_adapter(one, tmp_path / "one")
    other = load_adapter(model, tmp_path / "one", name="other")
    with activate(model, "one"):
        expected = answer("llama", model)
    with activate(model, other):
        assert torch.equal(answer("llama", model), expected)
    with pytest.raises(ConfigError, match="attached already"):
        load_adapter(model, tmp_path / "one", name="one")
    detach(model, "one")
    with activate(model, other):
        assert torch.equal(answer("llama", model), expected)
    detach(model, "other")
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_loading_draws_no_random_numbers(tmp_path):
    save_adapter(attach(llama(), LoRA(target_modules="all-linear")), tmp_path / "x")
    model = llama()
    state = torch.get_rng_state()
    load_adapter(model, tmp_path / "x")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_adapter_trains_like_the_one_that_was_saved(tmp_path):
    model, again = llama(), llama()
    adapter = stirred(model, LoRA(r=3, target_modules="all-linear"))
    save_adapter(adapter, tmp_path / "x")
    loaded = load_adapter(again, tmp_path / "x")
    sample = ARCHITECTURES["llama"].sample(model, 3, 5)
    for each, handle in ((model, adapter), (again, loaded)):
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
        for _ in range(3):
            with activate(each, handle):
                each(**sample, labels=sample["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in each.parameters())
    for (name, one), (_, other) in zip(
        adapter.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_an_adapter_in_half_precision_is_kept_in_full(tmp_path):
    model = llama().bfloat16()
    adapter = stirred(model, LoRA(target_modules="q_proj"))
    save_adapter(adapter, tmp_path / "x")
    loaded = load_adapter(llama().bfloat16(), tmp_path / "x")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    pairs = zip(adapter.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_copy_of_the_model_saves_its_own_adapter(tmp_path):
    model = llama()
    stirred(model, LoRA(target_modules="q_proj"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapters(twin)["default"].parameters():
            parameter.zero_()
    save_adapter(adapters(twin)["default"], tmp_path / "twin")
    loaded = load_adapter(llama(), tmp_path / "twin")
    assert all(not p.any() for p in loaded.parameters())
    assert all(p.any() for p in adapters(model)["default"].parameters())


def test_a_detached_adapter_can_still_be_saved(tmp_path):
    model = llama()
    adapter = stirred(model, LoRA(target_modules="q_proj"))
    save_adapter(adapter, tmp_path / "1")
    detach(model, adapter)
    save_adapter(adapter, tmp_path / "2")
    assert (tmp_path / "1" / WEIGHTS).read_bytes() == (tmp_path / "2" / WEIGHTS).read_bytes()


def test_what_is_not_saved(tmp_path):
    model = llama()
    adapter = stirred(model, LoRA(target_modules="q_proj"))
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="not written"):
        save_adapter(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    root = attach(nn.Sequential(nn.Linear(3, 4)), LoRA(r=1, target_modules="0"))
    save_adapter(root, tmp_path / "root")
    with pytest.raises(AdapterFileError, match="exists already"):
        save_adapter(root, tmp_path / "root")
    save_adapter(root, tmp_path / "root", overwrite=True)


def test_another_base_is_refused_by_its_digest_and_warned_of_by_its_name(tmp_path):
    save_adapter(
        attach(llama(name="org/small", digest="a" * 64), LoRA(target_modules="q_proj")),
        tmp_path / "x",
    )
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/small" and config["task_type"] == "CAUSAL_LM"
    other = llama(name="org/small", digest="b" * 64)
    with pytest.raises(AdapterFileError, match="another base") as caught:
        load_adapter(other, tmp_path / "x")
    assert "allow_other_base=True" in (caught.value.mend or "") and not adapters(other)
    loaded = load_adapter(other, tmp_path / "x", allow_other_base=True)
    assert loaded.base["digest"] == "b" * 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(name="/elsewhere/renamed", digest="a" * 64), tmp_path / "x")
        (tmp_path / "x" / PROVENANCE).unlink()
        load_adapter(llama(name="/models/Small/", digest="b" * 64), tmp_path / "x")
    with pytest.warns(LoricaWarning, match="made for the base org/small"):
        load_adapter(llama(name="org/large", digest="b" * 64), tmp_path / "x")


def test_the_card_and_the_provenance(tmp_path):
    adapter = attach(llama(name="org/small", digest="d"), LoRA(target_modules="q_proj"))
    save_adapter(adapter, tmp_path / "1", provenance={"data": {"digest": "e"}})
    facts = json.loads((tmp_path / "1" / PROVENANCE).read_text())
    assert facts["data"] == {"digest": "e"} and facts["base"]["digest"] == "d" and facts["reason"]
    assert 'base_model: "org/small"' in (tmp_path / "1" / CARD).read_text()
    save_adapter(adapter, tmp_path / "2", model_card="# Mine\n")
    assert (tmp_path / "2" / CARD).read_text() == "# Mine\n"
    with pytest.raises(AdapterFileError, match="JSON"):
        save_adapter(adapter, tmp_path / "3", provenance={"x": float("nan")})
    assert not (tmp_path / "3").exists()


def test_a_layer_under_two_names_carries_one_set_of_tensors(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x).relu())

    model = Twice()
    adapter = stirred(model, LoRA(r=2, target_modules="first"))
    x = torch.randn(4, 5)
    with activate(model, adapter):
        expected = model(x)
    save_adapter(adapter, tmp_path / "x")
    detach(model, adapter)
    with activate(model, load_adapter(model, tmp_path / "x")):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_of_every_precision_are_read(dtype, tmp_path):
    adapter = stirred(llama(), LoRA(target_modules="q_proj"))
    save_adapter(adapter, tmp_path / "x")
    tensors = {name: t.to(dtype) for name, t in load_file(tmp_path / "x" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "x" / WEIGHTS)
    loaded = load_adapter(llama(), tmp_path / "x")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for one, other in zip(adapter.parameters(), loaded.parameters(), strict=True):
        assert other.dtype == wide and torch.equal(one.to(dtype).to(wide), other)

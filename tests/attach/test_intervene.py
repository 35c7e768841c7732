"""LoReFT: its equation, the tokens that it edits, and that it leaves the rest alone."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorica
from architectures import ARCHITECTURES, inputs_of, said
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.attach.handle import Adapter
from lorica.base.batch import telling
from lorica.errors import ActivationError, ConfigError, MergeError, TargetError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import LoReFT, PromptTuning
from lorica.methods.loreft import orthonormal
from lorica.tasks.causal_lm import CausalLM
from train.words import WordTokenizer, examples

MODELS = ("llama", "gpt2", "bloom", "qwen3_moe", "bert", "deberta-v2", "modernbert")
SMALL = LoReFT(r=3, prefix_positions=2, suffix_positions=1)


def stirred(model: nn.Module, method: LoReFT = SMALL, name: str = "a") -> Adapter:
    adapter = attach(model, method, name=name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return adapter


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def oracle(h: np.ndarray, tensors: Any) -> np.ndarray:
    """Equation 1 of the paper, with R by Gram and Schmidt."""
    rows: list[np.ndarray] = []
    for free in tensors["R"].detach().double().numpy():
        for row in rows:
            free = free - row * (row @ free)
        rows.append(free / np.sqrt(free @ free))
    R, W = np.stack(rows), tensors["W"].detach().double().numpy()
    b = tensors["b"].detach().double().numpy()
    return h + (h @ W.T + b - h @ R.T) @ R


@pytest.mark.parametrize("told", [None, (7, 4, 5)])
def test_the_equation_at_the_first_and_last_tokens_of_the_prompt(told):
    model = ARCHITECTURES["llama"].build()
    inputs = inputs_of("llama", model)
    adapter = stirred(
        model, LoReFT(r=3, prefix_positions=2, suffix_positions=1, layers_to_transform=1)
    )
    last: list[Tensor] = []
    handle = model.model.layers[1].register_forward_hook(lambda m, i, y: last.append(y))
    with activate(model, None):
        said("llama", model, **inputs)
    with activate(model, "a"), telling(model, told):
        actual = said("llama", model, **inputs)
    handle.remove()
    h = last[0].double().numpy()
    edited = h.copy()
    for row, size in enumerate(told or (7, 7, 7)):
        for place in (0, 1, size - 1):
            edited[row, place] = oracle(h[row, place], adapter.slots["model.layers.1"].tensors)
    assert np.abs(edited - last[1].numpy()).max() < 1e-5
    with torch.no_grad():
        close(model.lm_head(model.model.norm(torch.tensor(edited).float())), actual)


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_and_leaving_gives_it_back(name):
    model = ARCHITECTURES[name].build()
    inputs = inputs_of(name, model)
    before = said(name, model, **inputs)
    types = {path: type(module) for path, module in model.named_modules()}
    attach(model, SMALL, name="a")
    with activate(model, "a"):
        assert torch.equal(said(name, model, **inputs), before)
    detach(model, "a")
    stirred(model)
    with activate(model, "a"):
        assert (said(name, model, **inputs) - before).abs().max() > 1e-3
    detach(model, "a")
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert torch.equal(said(name, model, **inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_each_alone_without_their_padding(name):
    model = ARCHITECTURES[name].build()
    stirred(model)
    stirred(model, LoReFT(r=2, prefix_positions=0, suffix_positions=2), "other")
    rows: list[Any] = ["a", None, {"a": 0.5, "other": 1.0}]
    inputs = inputs_of(name, model)
    inputs["attention_mask"][0, 4:] = 0
    inputs["attention_mask"][2, 6:] = 0
    with activate(model, rows):
        together = said(name, model, **inputs)
    decodes = ARCHITECTURES[name].task == "causal-lm"
    for index, entry in enumerate(rows):
        real = int(inputs["attention_mask"][index].sum())
        with activate(model, entry):
            one = {key: value[index : index + 1, :real] for key, value in inputs.items()}
            alone = said(name, model, **one)
        close(together[index : index + 1, :real] if decodes else together[index][None], alone)


def test_what_is_generated_is_not_edited():
    """With a cache, as if every step had been told where the prompt ends."""
    model = ARCHITECTURES["llama"].build()
    stirred(model)
    inputs = inputs_of("llama", model)
    inputs["attention_mask"][1, :3] = 0
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    with activate(model, "a"):
        made = model.generate(**inputs, **how)
        with telling(model, (7, 4, 7)):
            slow = model.generate(**inputs, **how, use_cache=False)
        plain = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(made, slow) and not torch.equal(made, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_padded_and_recomputed_have_the_same_gradients(checkpointing):
    found = []
    for packing in (False, True):
        model = ARCHITECTURES["llama"].build()
        adapter = stirred(model)
        task = CausalLM.of(WordTokenizer(), packing=packing)
        block = examples(3, 5)
        with activate(model, None):
            task.shares(model)
        if checkpointing:
            model.train()
            model.activation_checkpointing_enable({"use_reentrant": False})
        with task.running(model), activate(model, "a"):
            (loss,) = task.losses(model, task.collate([block], model))
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapter.parameters())])
    for one, other in zip(*found, strict=True):
        close(one, other)
    assert all(g.abs().max() > 0 for g in found[0])
    if checkpointing:
        return
    plain = ARCHITECTURES["llama"].build()
    task = CausalLM.of(WordTokenizer(), packing=False)
    (loss,) = task.losses(plain, task.collate([examples(3, 5)], plain))
    assert (loss - found[0][0]).abs() > 1e-3


def test_gradients_in_double_precision():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    given = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 6), (2, 6), (2,))
    ]
    for tensor in given:
        tensor.requires_grad_(True)

    def edit(R: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return SMALL.intervene(y, {"R": R, "W": W, "b": b})

    assert torch.autograd.gradcheck(edit, given)
    R = orthonormal(given[0])
    close(R @ R.t(), torch.eye(2, dtype=torch.float64))
    assert torch.allclose(orthonormal(R), R, atol=1e-12)


def test_files_give_the_same_adapter_and_the_same_bytes(tmp_path):
    model = ARCHITECTURES["bert"].build()
    method = LoReFT(r=3, prefix_positions=1, layers_to_transform="1", modules_to_save="classifier")
    adapter = attach(model, method, name="a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    inputs = inputs_of("bert", model)
    with activate(model, "a"):
        expected = said("bert", model, **inputs)
    save_adapter(adapter, tmp_path / "one")
    again = ARCHITECTURES["bert"].build()
    loaded = load_adapter(again, tmp_path / "one", name="b")
    with activate(again, "b"):
        assert torch.equal(said("bert", again, **inputs), expected)
    save_adapter(loaded, tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    twin = copy.deepcopy(again)
    with activate(twin, "b"):
        assert torch.equal(said("bert", twin, **inputs), expected)


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("t5", {}, "does not reach encoder-decoder models"),
        ("albert", {}, "has no list of 2 blocks"),
        ("cnn", {}, "need a model of transformers"),
        ("llama", {"layers_to_transform": 2}, "there is no layer 2"),
        ("llama", {"r": 40}, "r=40 is more than the width"),
    ],
)
def test_models_that_cannot_are_named(name, settings, word):
    model = ARCHITECTURES[name].build()
    with pytest.raises(TargetError, match=word):
        attach(model, LoReFT(**settings))
    assert lorica.adapters(model) == {}


def test_what_cannot_act_is_refused():
    model = ARCHITECTURES["llama"].build()
    stirred(model)
    attach(model, PromptTuning(num_virtual_tokens=2), name="prompt")
    inputs = inputs_of("llama", model)
    with activate(model, {"a": 1.0, "prompt": 1.0}), pytest.raises(ActivationError, match="apart"):
        said("llama", model, **inputs)
    with activate(model, "a"):
        with telling(model, (1, 1, 1)), pytest.raises(ActivationError, match="have no prompt"):
            said("llama", model, **inputs)
        with telling(model, (3, 3)), pytest.raises(ActivationError, match="2 prompts were told"):
            said("llama", model, **inputs)
    with pytest.raises(MergeError, match="load it beside the base"):
        lorica.merge(model, {"a": 1.0})
    with pytest.raises(ConfigError, match="nothing is edited"):
        LoReFT(prefix_positions=0, suffix_positions=0)

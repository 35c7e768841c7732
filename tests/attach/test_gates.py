"""UniPELT's gates: the equations, and that no text and no padding has a say in another's gate."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from architectures import ARCHITECTURES, inputs_of, said
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import Adapter
from lorica.base.batch import telling
from lorica.errors import ActivationError, AdapterFileError, ConfigError, MergeError, TargetError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import (
    GatedBottleneck,
    GatedLoRA,
    GatedPrefixTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from lorica.tasks.causal_lm import CausalLM
from lorica.tasks.documents import NAME
from lorica.tasks.layout import lay_out
from lorica.tasks.probe import attention
from train.words import WordTokenizer, examples

PREFIX: Any = GatedPrefixTuning(num_virtual_tokens=3)
PARTS: dict[str, Any] = {
    "lora": GatedLoRA(r=3),
    "houlsby": GatedBottleneck(reduction_factor=6, layout="houlsby"),
    "beside": GatedBottleneck(reduction_factor=6, layout="parallel", adapter_scaling=2),
    "prefix": PREFIX,
}


def stirred(adapter: Adapter, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return adapter


def unipelt(model: nn.Module, name: str = "u", seed: int = 0) -> Adapter:
    """All three parts, as one adapter."""
    prefix = attach(model, PREFIX, name=f"{name}.prefix")
    behind = attach(
        model,
        GatedBottleneck(reduction_factor=6),
        name=f"{name}.bottleneck",
        on=prefix,
        together=True,
    )
    return stirred(attach(model, GatedLoRA(r=3), name=name, on=behind, together=True), seed)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def mean_gate(x: Tensor, tensors: Any, sizes: tuple[int, ...]) -> list[float]:
    """Of every row, over its first tokens."""
    w, b = tensors["gate"].detach().double(), tensors["gate_bias"].detach().double()
    return [
        sum(1 / (1 + float((-(token.double() @ w[0] + b)).exp())) for token in row[:size]) / size
        for row, size in zip(x, sizes, strict=True)
    ]


# --- the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [None, (7, 4, 5)])
@pytest.mark.parametrize("part", ["lora", "houlsby", "beside"])
def test_the_update_is_multiplied_by_the_mean_over_the_prompt(part, told):
    model = ARCHITECTURES["llama"].build()
    adapter = stirred(attach(model, PARTS[part], name="a"))
    path, slot = list(adapter.slots.items())[-1]
    seen: list[Any] = []
    layer = model.get_submodule(path)
    plain = ARCHITECTURES["llama"].build().get_submodule(path)
    handle = layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with activate(model, "a"), telling(model, told):
        said("llama", model, **inputs_of("llama", model))
    handle.remove()
    x, actual = seen[0]
    t = {key: tensor.detach().double() for key, tensor in slot.tensors.items()}
    with torch.no_grad():
        y, x = plain(x).double(), x.double()
    source = y if part == "houlsby" else x
    gates = torch.tensor(mean_gate(source, t, told or (7, 7, 7)))[:, None, None]
    if part == "lora":
        update = x @ t["A"].t() @ t["B"].t()
    else:
        inner = (source @ t["down"].t() + t["down_bias"]).relu()
        update = PARTS[part].adapter_scaling * (inner @ t["up"].t() + t["up_bias"])
    assert (update.abs() > 1e-3).any() and gates.std() > 1e-3
    close(actual.double(), y + gates * update)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert"])
def test_a_prefix_is_what_plain_prefix_tuning_has_when_each_layer_is_multiplied(name):
    """For each row the gates are read off the attention's input, and given to a plain prefix."""
    model = ARCHITECTURES[name].build()
    adapter = stirred(attach(model, PREFIX, name="a"))
    inputs = inputs_of(name, model)
    stack, *places = adapter.slots
    caught: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(place).register_forward_pre_hook(
            lambda m, args, kwargs, place=place: caught.update(
                {place: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for place in places
    ]
    with activate(model, "a"):
        together = said(name, model, **inputs)
    for handle in handles:
        handle.remove()
    gates = [mean_gate(caught[p], adapter.slots[p].tensors, (7, 7, 7)) for p in places]
    plain = ARCHITECTURES[name].build()
    method: Any = PrefixTuning(num_virtual_tokens=3)
    other = attach(plain, method, name="b")
    flat = adapter.slots[stack].tensors["prefix"].detach()
    for row in range(3):
        share = torch.tensor([layer[row] for layer in gates]).repeat_interleave(
            flat.shape[1] // len(places)
        )
        with torch.no_grad():
            other.slots[stack].tensors["prefix"].copy_(flat * share)
        with activate(plain, "b"):
            alone = said(name, plain, **{key: value[[row]] for key, value in inputs.items()})
        close(together[[row]], alone)


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_padding_and_neighbours_change_no_gate(name):
    model = ARCHITECTURES[name].build()
    unipelt(model)
    decodes = name != "bert"
    inputs = inputs_of(name, model)
    sizes = (7, 4, 6)
    for row, size in enumerate(sizes):
        hidden = slice(0, 7 - size) if decodes else slice(size, 7)
        inputs["attention_mask"][row, hidden] = 0
    if decodes:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if name != "opt":
            inputs["position_ids"] = positions
    with activate(model, "u"):
        together = said(name, model, **inputs)
        for row, size in enumerate(sizes):
            real = slice(7 - size, 7) if decodes else slice(0, size)
            one = {key: value[[row], real] for key, value in inputs.items()}
            alone = said(name, model, **one)
            mine = together[[row], real] if decodes else together[[row]]
            close(mine, alone)


def test_documents_of_a_flat_row_have_gates_of_their_own():
    model = ARCHITECTURES["llama"].build()
    unipelt(model)
    ids = inputs_of("llama", model, batch=4, length=9)["input_ids"]
    lengths, prompts = (9, 3, 6, 1), (5, 3, 2, 1)
    documents, _, positions = lay_out([lengths])
    flat = torch.zeros(1, len(positions), dtype=torch.long)
    flat[0, : sum(lengths)] = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])
    inputs = {"input_ids": flat, "position_ids": positions[None], "documents": documents}
    with activate(model, "u"):
        with attention(model, NAME), telling(model, prompts):
            packed = said("llama", model, **inputs)[0]
        start = 0
        for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            told = (prompt,) if prompt > 1 else None  # a text of one token is all prompt
            with telling(model, told):
                alone = said("llama", model, input_ids=ids[[row], :length])[0]
            close(packed[start : start + length], alone)
            start += length


def test_packed_and_padded_training_have_the_same_gradients():
    found = []
    for packing in (False, True):
        model = ARCHITECTURES["llama"].build()
        adapter = unipelt(model)
        task = CausalLM.of(WordTokenizer(), packing=packing)
        with activate(model, None):
            assert task.packs(model) is packing
        with task.running(model), activate(model, "u"):
            (loss,) = task.losses(model, task.collate([examples(3, 5)], model))
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapter.parameters())])
    for one, other in zip(*found, strict=True):
        close(one, other)
    assert all(g.abs().max() > 0 for g in found[0])


def test_recomputed_layers_have_the_same_gradients():
    found = []
    for recompute in (False, True):
        model: Any = ARCHITECTURES["llama"].build().train()
        adapter = stirred(attach(model, GatedLoRA(r=3), name="a"))
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with activate(model, "a"):
            model(**inputs_of("llama", model)).logits.square().mean().backward()
        found.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_what_is_generated_does_not_move_the_gate():
    """With a cache, as if every step without one had been told where the prompt ends."""
    model: Any = ARCHITECTURES["llama"].build()
    unipelt(model)
    inputs = inputs_of("llama", model)
    inputs["attention_mask"][1, :3] = 0
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    with activate(model, "u"):
        made = model.generate(**inputs, **how)
        beams = model.generate(**inputs, **how, num_beams=3)
        with telling(model, (7, 4, 7)):
            slow = model.generate(**inputs, **how, use_cache=False)
        for row in range(3):
            one = {key: value[[row]] for key, value in inputs.items()}
            assert torch.equal(model.generate(**one, **how, num_beams=3)[0], beams[row])
        plain = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(made, slow) and not torch.equal(made, plain)


def test_a_cache_gives_the_logits_of_the_whole_text():
    model = ARCHITECTURES["llama"].build()
    unipelt(model)
    ids = inputs_of("llama", model)["input_ids"]
    with activate(model, "u"), torch.no_grad():
        with telling(model, (4, 4, 4)):
            whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        cache = copy.deepcopy(first.past_key_values)
        rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    close(torch.cat([first.logits, rest], 1), whole)
    with activate(model, None), torch.no_grad():
        bare = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    attach(model, LoRA(r=2), name="other")
    stirred(attach(model, GatedLoRA(r=2), name="alone"))
    with activate(model, "alone"), pytest.raises(ActivationError, match="cache was not filled"):
        said("llama", model, input_ids=ids[:, 4:], past_key_values=bare)


# --- beside others --------------------------------------------------------------------------------


def test_rows_of_a_batch_equal_each_alone():
    model = ARCHITECTURES["llama"].build()
    unipelt(model, "a")
    unipelt(model, "b", seed=1)
    inputs = inputs_of("llama", model, batch=4)
    rows = ["a", None, "b", "a"]
    with activate(model, rows):
        together = said("llama", model, **inputs)
    for number, row in enumerate(rows):
        with activate(model, row):
            alone = said("llama", model, **{key: v[[number]] for key, v in inputs.items()})
        close(together[[number]], alone)


def test_a_fresh_one_opens_every_gate_about_half_and_changes_nothing():
    model = ARCHITECTURES["llama"].build()
    inputs = inputs_of("llama", model)
    base = said("llama", model, **inputs)
    behind = attach(model, GatedBottleneck(), name="b")
    attach(model, GatedLoRA(), name="a", on=behind, together=True)
    with activate(model, "a"):
        assert torch.equal(said("llama", model, **inputs), base)
    kept = model.__dict__["_lorica_attached"].status.gates.kept
    assert len(kept) == 6 and all(0.3 < float(g) < 0.7 for each in kept.values() for g in each)


# --- files ----------------------------------------------------------------------------------------


def test_files_give_the_same_adapter_and_the_same_bytes(tmp_path):
    model = ARCHITECTURES["llama"].build()
    adapter = unipelt(model)
    inputs = inputs_of("llama", model)
    with activate(model, "u"):
        expected = said("llama", model, **inputs)
    save_adapter(adapter, tmp_path / "one")
    again = ARCHITECTURES["llama"].build()
    loaded = load_adapter(again, tmp_path / "one", name="b")
    with activate(again, "b"):
        assert torch.equal(said("llama", again, **inputs), expected)
    save_adapter(loaded, tmp_path / "two")
    files = [p for p in (tmp_path / "one").rglob("adapter_*") if p.is_file()]
    assert len(files) == 6
    for file in files:
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes()
    lorica.detach(again, "b")
    assert torch.equal(said("llama", again, **inputs), said("llama", model, **inputs))


@pytest.mark.parametrize("part", ["lora", "prefix"])
def test_a_file_that_lost_the_place_of_its_gates_is_refused(part, tmp_path):
    model = ARCHITECTURES["llama"].build()
    save_adapter(attach(model, PARTS[part], name="a"), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    lost = '"model": {' if part == "lora" else '"model.layers.1.self_attn": {'
    assert lost in config.read_text()
    config.write_text(config.read_text().replace(lost, lost.replace('": {', '.no": {')))
    with pytest.raises(AdapterFileError, match="does not fit"):
        load_adapter(ARCHITECTURES["llama"].build(), tmp_path / "a")


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "word"),
    [
        ("t5", "lora", "does not reach encoder-decoder models"),
        ("t5", "prefix", "does not reach encoder-decoder models"),
        ("modernbert", "prefix", "needs layers that take past keys and values"),
        ("mamba", "prefix", "recurrent"),
        ("vit", "lora", "takes no virtual tokens|takes no embedded tokens"),
        ("cnn", "prefix", "need a model of transformers"),
    ],
)
def test_models_that_cannot_are_named(name, part, word):
    model = ARCHITECTURES[name].build()
    with pytest.raises(TargetError, match=word):
        attach(model, PARTS[part])
    assert lorica.adapters(model) == {}


def test_what_cannot_act_is_refused():
    model = ARCHITECTURES["llama"].build()
    unipelt(model)
    inputs = inputs_of("llama", model)
    with (
        activate(model, "u"),
        telling(model, (1, 1, 1)),
        pytest.raises(ActivationError, match="have no prompt"),
    ):
        said("llama", model, **inputs)
    with pytest.raises(MergeError, match="load it beside the base"):
        lorica.merge(model, {"u": 1.0})
    prompt: Any = PromptTuning(num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="virtual tokens would be among them"):
        attach(model, prompt, name="p", on="u")
    head = attach(model, GatedLoRA(r=2, target_modules=("lm_head",)), name="head")
    task = CausalLM.of(WordTokenizer(), packing=True)
    with activate(model, head), pytest.raises(ActivationError, match="lm_head was given"):
        task.losses(model, task.collate([examples(3, 5)], model))


def test_a_module_of_ones_own_has_a_text_in_every_entry_of_its_first_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    stirred(attach(model, GatedLoRA(r=2, target_modules="all-linear"), name="a"))
    x = torch.randn(3, 2, 4, 5)
    with activate(model, "a"), torch.no_grad():
        together = model(x)
        for row in range(3):
            close(together[[row]], model(x[[row]]))
        assert (together[:, :1] - model(x[:, :1])).abs().max() > 1e-4  # one text, cut

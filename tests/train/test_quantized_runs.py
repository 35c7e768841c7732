"""Runs on quantized bases: the promises of bits hold on them as on plain ones."""

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.base.known import base_of
from lorica.base.quantize import dequantize_model, quantize_model, quantized_layers
from lorica.config import TrainSettings
from lorica.errors import CheckpointError, Interrupted
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train import reuse
from lorica.train.engine import Engine, Trainee
from lorica.train.frozen import frozen_layers, states_file
from lorica.train.loop import train
from train.runs import SETTINGS, outcome, stop_after
from train.words import WordTokenizer, examples

STORED = pytest.mark.parametrize("word", ["nf4", "int8"])


def model_with(word, *names, method=None):
    """A small Llama, stored so, with an adapter of each name, which decides its rank."""
    model = ARCHITECTURES["llama"].build()
    if word is not None:
        quantize_model(model, word)
    for name in names:
        own = method or LoRA(r=3 + ord(name) % 4, target_modules="all-linear", lora_dropout=0.1)
        lorica.attach(model, own, name=name, seed=ord(name))
    return model


def tensors_of(adapter):
    return {key: p.detach().clone() for key, p in adapter.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- beside others --------------------------------------------------------------------------------


@STORED
def test_beside_others_an_adapter_trains_to_the_same_bits_as_alone(word):
    def trained(names):
        model = model_with(word, *names)
        handles = lorica.adapters(model)
        engine = Engine(model, CausalLM.of(WordTokenizer()))
        settings = TrainSettings(learning_rate=2e-2, max_steps=4, seed=3)
        trainees = [Trainee(handles[name], settings, 4) for name in names]
        for step in range(4):
            work = [[examples(100 * ord(name) + step, 3)] for name in names]
            engine.step(trainees, work)
        return tensors_of(handles["a"])

    alone = trained("a")
    assert same(trained("abc"), alone)
    assert same(trained("ca"), alone)


# --- stopped and gone on with ---------------------------------------------------------------------


def run(folder, word, *, resume=False, **changes):
    return train(
        model_with(word, "a", "b"),
        {"a": examples(1, 17), "b": examples(2, 11)},
        TrainSettings(**{**SETTINGS, **changes}),
        output_dir=folder,
        eval_data=examples(3, 7),
        task=CausalLM.of(WordTokenizer()),
        resume=resume,
    )


@STORED
def test_a_stopped_run_goes_on_to_the_same_bits(word, tmp_path, monkeypatch):
    run(tmp_path / "whole", word)
    folder = tmp_path / "run"
    for step, resume in ((3, False), (6, True)):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted):
                run(folder, word, resume=resume)
    run(folder, word, resume=True)
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_run_does_not_go_on_with_the_base_in_another_storage(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", "nf4")
    for other in ("int8", None):
        with pytest.raises(CheckpointError) as caught:
            run(tmp_path / "run", other, resume=True)
        assert any("base" in problem for problem in caught.value.problems)


def test_a_base_quantized_in_memory_is_no_longer_the_one_of_its_files():
    model = lorica.load_model("embedded", dtype="float32")
    plain = base_of(model).digest
    quantize_model(model, "nf4")
    way = lorica.load_model("embedded", dtype="float32", quantize="nf4")
    assert base_of(model).facts() == base_of(way).facts()
    assert base_of(model).digest != plain
    dequantize_model(model)
    assert base_of(model).quantize is None
    assert base_of(model).digest not in (plain, base_of(way).digest)


# --- memory ---------------------------------------------------------------------------------------


@STORED
def test_gradient_checkpointing_gives_the_same_bits(word):
    def gradients(on):
        model = model_with(word, "a")
        adapter = lorica.adapters(model)["a"]
        engine = Engine(model, CausalLM.of(WordTokenizer()), gradient_checkpointing=on)
        settings = TrainSettings(learning_rate=2e-2, max_steps=2, seed=3)
        trainee = Trainee(adapter, settings, 2)
        for step in range(2):
            engine.step([trainee], [[examples(step, 4)]])
        return tensors_of(adapter)

    assert same(gradients(True), gradients(False))


@STORED
def test_frozen_layers_give_the_same_bits_wherever_their_outputs_come_from(
    word, tmp_path, monkeypatch
):
    def tuned(folder, reused, stored=word):
        upper = LoRA(r=4, target_modules="all-linear", layers_to_transform=[1])
        model = model_with(stored, "a", method=upper)
        settings = TrainSettings(
            learning_rate=1e-2, batch_size=4, epochs=3, reuse_frozen_layers=reused
        )
        task = CausalLM.of(WordTokenizer())
        train(model, {"a": examples(1, 13)}, settings, output_dir=tmp_path / folder, task=task)
        return tensors_of(lorica.adapters(model)["a"])

    plain, exact = tuned("plain", None), tuned("exact", "disk", None)
    memory, disk = tuned("memory", "memory"), tuned("disk", "disk")
    again = tuned("again", "disk")  # from the file of the run before
    monkeypatch.setattr(reuse, "LARGEST_SHARE", 0.0)  # computed in every step
    assert same(memory, disk) and same(memory, again) and same(memory, tuned("none", "memory"))
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor, memory[key], rtol=0, atol=2e-4)
    assert not same(memory, exact)  # nobody took the outputs of the plain base for those of this


# --- starts, files, answers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain base in float32 on the disk, for starts that read what was there before."""
    made = tmp_path_factory.mktemp("base")
    model = lorica.load_model("embedded", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # not as round as numbers that were in bfloat16 once
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.mul_(1 + noise * 1e-3)
    model.save_pretrained(made)
    base_of(model).tokenizer.save_pretrained(made)
    return made


IDS = torch.arange(30)[None] + 5


def logits(model, mixture):
    with torch.no_grad(), activate(model, mixture):
        return model(IDS).logits


@pytest.mark.parametrize("start", ["loftq", "pissa", "olora"])
def test_a_start_from_parts_of_the_weight_is_saved_and_loaded(start, folder, tmp_path):
    def base():
        return lorica.load_model(folder, dtype="float32", quantize="nf4")

    model = base()
    bare = model(IDS).logits.detach()
    method = LoRA(r=4, target_modules="attention", init_lora_weights=start)
    adapter = lorica.attach(model, method, name="a")
    with activate(model, "a"):
        model(IDS, labels=IDS).loss.backward()
    for parameter in adapter.parameters():
        parameter.data -= 0.01 * parameter.grad.sign()
    expected = logits(model, "a")
    assert not torch.allclose(expected, bare, atol=1e-3)
    lorica.save_adapter(adapter, tmp_path / "a")
    other = base()
    loaded = lorica.load_adapter(other, tmp_path / "a", name="b")
    torch.testing.assert_close(logits(other, loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(other, None), logits(model, None))
    lorica.save_adapter(loaded, tmp_path / "b")
    names = ("adapter_model.safetensors",)
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )


def test_an_adapter_is_at_home_on_its_quantized_base_in_another_dtype(folder, tmp_path, recwarn):
    model = lorica.load_model(folder, dtype="bfloat16", quantize="nf4")
    lorica.save_adapter(lorica.attach(model, LoRA(r=2), name="a"), tmp_path / "a")
    assert model.dtype == torch.bfloat16
    other = lorica.load_model(folder, dtype="float32", quantize="nf4")
    for (_, one), (_, two) in zip(quantized_layers(model), quantized_layers(other), strict=True):
        assert one.stored_dtype == torch.bfloat16 and two.stored_dtype == torch.float32
        assert all(torch.equal(t, two.stored()[name]) for name, t in one.stored().items())
    lorica.load_adapter(other, tmp_path / "a", name="a")
    assert not [str(w.message) for w in recwarn if "base" in str(w.message)]


@pytest.mark.parametrize("mixture", [{"a": 0.7, "b": 0.3}, ["a", {"a": 0.5, "b": 1.5}, None]])
def test_a_mixture_writes_what_it_writes_on_the_unpacked_base(mixture):
    words = []
    for unpacked in (False, True):
        model = lorica.load_model("embedded", dtype="float32", quantize="nf4")
        if unpacked:
            dequantize_model(model)
        how = LoRA(r=3, target_modules="all-linear", init_lora_weights="random")
        for seed, name in enumerate("ab"):
            lorica.attach(model, how, name=name, seed=seed)
        ids = IDS[:, :9].expand(len(mixture) if isinstance(mixture, list) else 1, -1)
        with activate(model, mixture):
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        words.append(made[:, 9:])
    assert torch.equal(*words)
    if len(words[0]) > 1:
        assert not torch.equal(words[0][0], words[0][2])  # the adapter does something


def test_outputs_of_frozen_layers_have_a_file_for_each_storage(tmp_path):
    upper = LoRA(r=4, target_modules="all-linear", layers_to_transform=[1])
    files = set()
    for word in (None, "nf4", "fp4", "int8"):
        model = lorica.load_model("embedded", dtype="float32")
        if word is not None:
            quantize_model(model, word)
        middle, why = frozen_layers(model, [lorica.attach(model, upper, name="a")])
        assert middle is not None, why
        files.add(states_file(tmp_path, model, middle))
    assert len(files) == 4


def test_a_base_with_another_norm_or_bias_is_another_base(tmp_path):
    """Their numbers are in no packed weight, and outputs of frozen layers depend on them."""
    upper = LoRA(r=4, target_modules="all-linear", layers_to_transform=[1])
    files = set()
    for changed in (False, True):
        model = lorica.load_model("embedded", dtype="float32", quantize="nf4")
        if changed:
            model.model.layers[0].input_layernorm.weight.data.mul_(2)
        middle, why = frozen_layers(model, [lorica.attach(model, upper, name="a")])
        assert middle is not None, why
        files.add(states_file(tmp_path, model, middle))
    assert len(files) == 2

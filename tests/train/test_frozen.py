"""Frozen layers that run once per record: the same bits wherever their outputs come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import Interrupted, TargetError
from lorica.methods.lora import LoRA
from lorica.methods.prompt_tuning import PromptTuning
from lorica.records.read import read_lines
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.train import reuse
from lorica.train.engine import Engine, Trainee
from lorica.train.frozen import FrozenLayers, frozen_layers
from lorica.train.loop import train
from lorica.train.states import StatesInMemory, StatesOnDisk
from train.runs import outcome, stop_after
from train.words import WordTokenizer, examples, fast_tokenizer

CAUSAL = ["llama", "gpt2", "falcon"]
ENCODERS = ["bert", "roberta", "modernbert"]


def still(model: nn.Module) -> nn.Module:
    """Without dropout, of which an encoder's config has some."""
    for module in model.modules():
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key, value in vars(model.config).items():
        if "drop" in key and isinstance(value, float):
            setattr(model.config, key, 0.0)
    return model


def base_and_task(name):
    model = still(ARCHITECTURES[name].build())
    if name in CAUSAL:
        return model, CausalLM.of(WordTokenizer()), examples(1, 13)
    generator = torch.Generator().manual_seed(0)
    records = [
        Example(torch.randint(5, 90, (3 + 4 * n % 40,), generator=generator).tolist(), [n % 3], n)
        for n in range(13)
    ]
    task = TextClassification(fast_tokenizer(pad_token="<pad>"), ("a", "b", "c"))
    return model, task, records


def upper(model, name="a", r=4):
    """An adapter on the second and last layer."""
    method = LoRA(r=r, target_modules="all-linear", layers_to_transform=[1])
    return attach(model, method, name=name)


def tuned(name, folder, reused, *, epochs=3, **settings):
    """Tensors of the adapter after a run, and what the run said."""
    model, task, records = base_and_task(name)
    adapter = upper(model)
    train(
        model,
        {adapter: records},
        TrainSettings(
            learning_rate=1e-2, batch_size=4, epochs=epochs, reuse_frozen_layers=reused, **settings
        ),
        output_dir=folder,
        task=task,
    )
    events = [event["text"] for event in read_lines(folder / "events.jsonl").values]
    return {k: p.detach().clone() for k, p in adapter.named_parameters()}, events


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- what autograd does without it ----------------------------------------------------------------


def test_autograd_records_nothing_below_the_lowest_adapted_layer():
    model, task, records = base_and_task("llama")
    adapter = upper(model)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, index=index: seen.update({index: out}))
    trainee = Trainee(adapter, TrainSettings(max_steps=1), 1)
    Engine(model, task).step([trainee], [[records[:4]]])
    assert seen[0].grad_fn is None and not seen[0].requires_grad
    assert seen[1].grad_fn is not None


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL + ENCODERS)
def test_a_run_has_the_same_bits_wherever_the_states_come_from(name, tmp_path, monkeypatch):
    plain, _ = tuned(name, tmp_path / "plain", None)
    memory, told = tuned(name, tmp_path / "memory", "memory")
    disk, _ = tuned(name, tmp_path / "disk", "disk")
    again, _ = tuned(name, tmp_path / "again", "disk")
    assert any("layers 1 to 1 of 2 run once per record" in text for text in told), told
    monkeypatch.setattr(reuse, "LARGEST_SHARE", 0.0)  # nothing is kept: computed in every step
    nothing, told = tuned(name, tmp_path / "nothing", "memory")
    assert any("0% of the records fit" in text for text in told), told
    assert same(memory, disk) and same(memory, again) and same(memory, nothing)
    for key, tensor in plain.items():
        assert torch.allclose(tensor, memory[key], atol=2e-5), key


@pytest.mark.parametrize("reused", ["memory", "disk"])
def test_a_run_that_goes_on_has_the_same_bits(reused, tmp_path, monkeypatch):
    def run(folder, resume=False):
        model, task, records = base_and_task("llama")
        settings = TrainSettings(
            learning_rate=1e-2, batch_size=4, epochs=3, reuse_frozen_layers=reused
        )
        data = {upper(model): records}
        train(model, data, settings, output_dir=folder, task=task, resume=resume)
        return outcome(folder)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # in the second epoch: all records are known
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped")
    assert run(tmp_path / "stopped", resume=True) == whole


def test_a_head_alone_is_trained_behind_layers_that_do_not_run():
    """Also where the rows that a classifier reads would be chosen in a layer that does not run."""
    found = []
    for reuses in (False, True):
        model, task, records = base_and_task("bert")
        adapter = attach(model, LoRA(r=2, target_modules=["classifier"]), name="a")
        middle, _ = frozen_layers(model, [adapter])
        layers = FrozenLayers(model, task, middle, StatesInMemory(10**9))
        how = {"skipping": layers.skipped} if reuses else {}
        engine, trainee = (
            Engine(model, task, **how),
            Trainee(adapter, TrainSettings(max_steps=2), 2),
        )
        assert not task.pads(model)
        losses = [engine.step([trainee], [[records[:8]]])[0].loss for _ in range(2)]
        assert layers.reused == (8 if reuses else 0)
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_checkpointing_recomputes_the_upper_layers_only_and_gives_the_same(tmp_path):
    plain, _ = tuned("llama", tmp_path / "one", "memory")
    redone, _ = tuned("llama", tmp_path / "two", "memory", gradient_checkpointing=True)
    for key, tensor in plain.items():
        assert torch.allclose(tensor, redone[key], atol=1e-6), key


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_state_does_not_depend_on_what_is_computed_with_it(name):
    model, task, records = base_and_task(name)
    middle, _ = frozen_layers(model, [upper(model)])

    def states(blocks):
        layers = FrozenLayers(model, task, middle, StatesInMemory(0))
        found = {}
        for block in blocks:
            for example, state in zip(block, layers._states_of(block), strict=True):
                found[example.row] = state
        return found

    together = states([records])
    alone = states([[r] for r in records])
    turned = states([records[::-1][:7], records[:6]])
    for row, state in together.items():
        assert torch.equal(state, alone[row]) and torch.equal(state, turned[row])
        assert len(state) == len(records[row])


def test_layers_run_once_for_every_record():
    model, task, records = base_and_task("llama")
    adapter = upper(model)
    middle, _ = frozen_layers(model, [adapter])
    layers = FrozenLayers(model, task, middle, StatesInMemory(10**9))
    engine = Engine(model, task, skipping=layers.skipped)
    trainee = Trainee(adapter, TrainSettings(max_steps=9), 9)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for start in (0, 4, 8, 0, 4, 8, 2, 6):
        engine.step([trainee], [[records[start : start + 4]]])
    before = len(calls)
    assert layers.computed == 12 and layers.reused == 20
    engine.step([trainee], [[records[1:5]]])
    assert len(calls) == before, "everything is known: the lower layer does not run"
    layers.close()


def test_adapters_that_begin_at_one_layer_share_the_states_and_train_as_alone():
    def after(names, picked):
        model, task, records = base_and_task("llama")
        handles = {n: upper(model, n, r=2 + i) for i, n in enumerate("ab")}
        middle, _ = frozen_layers(model, [handles[n] for n in names])
        layers = FrozenLayers(model, task, middle, StatesInMemory(10**9))
        engine = Engine(model, task, skipping=layers.skipped)
        trainees = [Trainee(handles[n], TrainSettings(max_steps=2), 2) for n in names]
        blocks = {"a": [records[:4], records[4:8]], "b": [records[3:7], records[:4]]}
        for step in range(2):
            engine.step(trainees, [[blocks[n][step]] for n in names])
        return {k: p.detach().clone() for k, p in handles[picked].named_parameters()}

    for name in "ab":
        assert same(after("ab", name), after(name, name))


# --- where it is off ------------------------------------------------------------------------------


def test_it_is_off_and_says_why():
    model, _, _ = base_and_task("llama")
    attach(model, LoRA(r=2, target_modules="all-linear"), name="low")
    attach(model, PromptTuning(num_virtual_tokens=3), name="prompt")
    attach(model, LoRA(r=2, target_modules=["lm_head"]), name="head")
    high = upper(model, "high")
    own = adapters(model)
    assert "acts at model.layers.0" in frozen_layers(model, [own["low"]])[1]
    assert frozen_layers(model, [own["prompt"]])[0] is None
    assert "same layer" in frozen_layers(model, [high, own["head"]])[1]
    assert frozen_layers(model, [own["head"]])[0].index == 2
    wet = ARCHITECTURES["bert"].build()
    assert "dropout" in frozen_layers(wet, [upper(wet)])[1]
    bloom = still(ARCHITECTURES["bloom"].build())  # its layers say their attention too
    assert "more than hidden states" in frozen_layers(bloom, [upper(bloom)])[1]
    shared = still(ARCHITECTURES["albert"].build())
    low = attach(shared, LoRA(r=2, target_modules="all-linear"), name="a")
    assert "no list of its layers" in frozen_layers(shared, [low])[1]


def test_a_run_without_lower_layers_says_so_and_trains(tmp_path):
    model, task, records = base_and_task("llama")
    adapter = attach(model, LoRA(r=2, target_modules="all-linear"), name="a")
    settings = TrainSettings(max_steps=1, batch_size=4, reuse_frozen_layers="memory")
    train(model, {adapter: records}, settings, output_dir=tmp_path / "run", task=task)
    events = [e["text"] for e in read_lines(tmp_path / "run/events.jsonl").values]
    assert any(text.startswith("reuse_frozen_layers is off: the adapter 'a'") for text in events)


def test_an_encoder_decoder_model_says_so(tmp_path):
    model = still(ARCHITECTURES["t5"].build())
    adapter = attach(model, LoRA(r=2, target_modules="all-linear"), name="a")
    task = Seq2Seq(fast_tokenizer(eos_token="</s>", pad_token="<pad>"))
    settings = TrainSettings(max_steps=1, batch_size=1, reuse_frozen_layers="disk")
    train(
        model,
        {adapter: [Example([5, 6, 2], [7, 8, 2])]},
        settings,
        output_dir=tmp_path / "run",
        task=task,
    )
    events = [e["text"] for e in read_lines(tmp_path / "run/events.jsonl").values]
    assert any("off: an encoder-decoder model" in text for text in events)


@pytest.mark.parametrize(
    "name", [n for n, a in ARCHITECTURES.items() if a.task in ("causal-lm", "text-classification")]
)
def test_every_architecture_is_entered_exactly_or_refused(name):
    arch = ARCHITECTURES[name]
    model = still(arch.build())
    try:
        adapter = upper(model)
    except TargetError:
        pytest.skip("no layer 1 to adapt")
    middle, why = frozen_layers(model, [adapter])
    if middle is None:
        assert why
        assert name not in (*CAUSAL, *ENCODERS, "gemma2", "qwen3", "mixtral", "distilbert"), why
        return
    sample = arch.sample(model, 3, 11)
    with torch.no_grad():
        wanted = arch.logits(model(**sample))
        with middle.below() as caught:
            model(**sample)
        with middle.above(caught[0]):
            entered = arch.logits(model(**sample))
        assert torch.equal(arch.logits(model(**sample)), wanted), "nothing stands in afterwards"
    assert torch.equal(entered, wanted)


class Nosy(nn.Module):
    """A layer that adds what another one said."""

    def __init__(self, layer, other):
        super().__init__()
        self.layer, self.said = layer, []
        other.register_forward_hook(lambda _m, _a, out: self.said.append(out))

    def forward(self, hidden_states, **how):
        return self.layer(hidden_states, **how) + sum(self.said.pop() for _ in self.said[:])


def test_layers_that_look_past_the_one_below_are_noticed():
    model, _, _ = base_and_task("llama")
    adapter = upper(model)
    assert frozen_layers(model, [adapter])[0] is not None
    model.model.layers[1] = Nosy(model.model.layers[1], model.model.layers[0])
    assert "depends on more" in frozen_layers(model, [adapter])[1]


# --- what is kept on disk -------------------------------------------------------------------------


def store(tmp_path, budget=10**6):
    return StatesOnDisk(tmp_path / "name", width=4, dtype=torch.float32, budget=budget)


def state(number, tokens=3):
    return torch.full((tokens, 4), float(number))


def test_states_on_disk_are_found_by_the_next_run(tmp_path):
    first = store(tmp_path)
    for number in range(5):
        first.put(bytes([number]) * 32, state(number, 1 + number))
    first.close()
    second = store(tmp_path)
    for number in range(5):
        assert torch.equal(second.get(bytes([number]) * 32), state(number, 1 + number))
    second.put(b"n" * 32, state(7))
    assert torch.equal(second.get(b"n" * 32), state(7))
    assert second.get(b"x" * 32) is None
    second.close()
    assert (tmp_path / "name.states").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "index flipped", "index gone"])
def test_damaged_states_are_not_read(tmp_path, damage):
    first = store(tmp_path)
    for number in range(3):
        first.put(bytes([number]) * 32, state(number))
    first.close()
    file = tmp_path / ("name.index" if "index" in damage else "name.states")
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(bytes(raw[:-5]) if damage == "cut" else bytes(raw))
    if damage == "index gone":
        file.unlink()
    second = store(tmp_path)
    assert second.get(bytes([2]) * 32) is None
    second.put(bytes([2]) * 32, state(2))
    assert torch.equal(second.get(bytes([2]) * 32), state(2))
    for number in range(2):
        found = second.get(bytes([number]) * 32)
        assert found is None if "index" in damage else torch.equal(found, state(number))
    second.close()


def test_a_stop_before_the_index_costs_no_more_than_computing_again(tmp_path):
    first = store(tmp_path)
    first.put(b"k" * 32, state(1))
    del first  # never closed
    assert not (tmp_path / "name.index").exists()


def test_two_runs_at_once_do_not_share_a_file(tmp_path):
    first, second = store(tmp_path), store(tmp_path)
    first.put(b"k" * 32, state(1))
    second.put(b"k" * 32, state(2))
    assert torch.equal(first.get(b"k" * 32), state(1))
    assert torch.equal(second.get(b"k" * 32), state(2))
    second.close()
    first.close()
    third = store(tmp_path)
    assert torch.equal(third.get(b"k" * 32), state(1))
    third.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_no_store_outgrows_its_budget(tmp_path, kind):
    room = 2 * state(0).nbytes
    own = StatesInMemory(room) if kind == "memory" else store(tmp_path, room)
    for number in range(4):
        own.put(bytes([number]) * 32, state(number))
    assert [own.get(bytes([n]) * 32) is not None for n in range(4)] == [True, True, False, False]
    own.close()


def test_other_weights_have_other_states(tmp_path):
    kept = tmp_path / "cache/lorica/frozen"
    tuned("llama", tmp_path / "one", "disk", epochs=1)
    (first,) = kept.glob("*.states")
    model, task, records = base_and_task("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    settings = TrainSettings(max_steps=1, batch_size=4, reuse_frozen_layers="disk")
    train(model, {upper(model): records}, settings, output_dir=tmp_path / "two", task=task)
    (second,) = kept.glob("*.states")
    assert first.name != second.name, "one base at a time is kept"

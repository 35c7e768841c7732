"""Methods that act between the steps: they go on to the same bits, and train beside others as
alone."""

import math
from collections import Counter

import pytest
import torch
import transformers
from torch import nn

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.plates import plates_of
from lorica.config import TrainSettings
from lorica.errors import ConfigError, Interrupted, NonFiniteError
from lorica.methods import LISA, AdaLoRA, LoRA
from lorica.methods.lisa import Draws, block_of
from lorica.tasks.causal_lm import CausalLM
from lorica.train.course import Course
from lorica.train.engine import Engine, Trainee
from lorica.train.loop import train
from train.runs import SETTINGS, outcome, stop_after
from train.words import WordTokenizer, examples

METHODS = {
    "adalora": AdaLoRA(
        init_r=4, target_r=2, tinit=2, tfinal=4, delta_t=2, target_modules=("q_proj", "up_proj")
    ),
    "lisa": LISA(lisa_activated_layers=1, lisa_interval_steps=3),
}
every = pytest.mark.parametrize("kind", METHODS)
PLAIN = {**SETTINGS, "early_stopping_patience": None, "max_steps": 10, "eval_steps": 4}


def model_with(kind, *names):
    model = ARCHITECTURES["llama"].build()
    for number, name in enumerate(names):
        attach(model, METHODS[kind], name=name, seed=number)
    return model


def run(kind, folder, *, resume=False, **changes):
    return train(
        model_with(kind, "a", "b"),
        {"a": examples(1, 17), "b": examples(2, 11)},
        TrainSettings(**{**PLAIN, **changes}),
        output_dir=folder,
        eval_data=examples(3, 7),
        task=CausalLM.of(WordTokenizer()),
        resume=resume,
    )


@every
def test_a_stopped_run_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch):
    run(kind, tmp_path / "whole")
    for step in (3, 7):
        folder = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted):
                run(kind, folder)
        run(kind, folder, resume=True)
        files, _, lines = outcome(folder)
        assert (files, lines) == outcome(tmp_path / "whole")[::2], step


@every
def test_beside_others_it_trains_to_the_same_bits_as_alone(kind):
    settings, steps = TrainSettings(learning_rate=2e-2, max_steps=9, seed=3), 9

    def trained(names, others=()):
        model = model_with(kind, *names)
        for name in others:
            attach(model, LoRA(r=3, target_modules=("q_proj",)), name=name)
        handles = lorica.adapters(model)
        engine = Engine(model, CausalLM.of(WordTokenizer()))
        trainees = [Trainee(handles[n], settings, steps) for n in handles]
        for step in range(steps):
            engine.step(trainees, [[examples(20 * i + step, 3)] for i in range(len(trainees))])
        found = dict(handles["a"].named_parameters())
        return found, trainees[0].between.state

    alone, state = trained(["a"])
    for names, others in ((["a", "b"], ()), (["a"], ["lora"])):
        beside, kept = trained(names, others)
        assert all(torch.equal(tensor, beside[key]) for key, tensor in alone.items())
        assert state.keys() == kept.keys()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in state.items())


@every
def test_a_step_that_fails_leaves_everything_as_it_was(kind):
    model = model_with(kind, "a")
    adapter = lorica.adapters(model)["a"]
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    trainee = Trainee(adapter, TrainSettings(learning_rate=1e-2, max_steps=6), 6)
    for step in range(3):
        engine.step([trainee], [[examples(step, 3)]])
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    state = {key: tensor.clone() for key, tensor in trainee.between.state.items()}
    model.get_submodule("model.rotary_emb").inv_freq.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        engine.step([trainee], [[examples(5, 3)]])
    after = dict(adapter.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(trainee.between.state[key], t) for key, t in state.items())


def test_adalora_ends_with_the_ranks_of_its_budget(tmp_path):
    model = model_with("adalora", "a")
    adapter = lorica.adapters(model)["a"]
    report = train(
        model,
        {"a": examples(1, 17)},
        TrainSettings(**PLAIN),
        output_dir=tmp_path / "run",
        eval_data=examples(3, 7),
        task=CausalLM.of(WordTokenizer()),
    )
    ranks = [len(slot.tensors["E"]) for slot in adapter.slots.values()]
    assert sum(ranks) == 2 * 4 and set(ranks) != {2}
    assert report.best_step["a"] >= 6  # not one from before the ranks were decided
    assert all(tensor.all() for s in adapter.slots.values() for tensor in [s.tensors["E"]])
    events = (tmp_path / "run/events.jsonl").read_text()
    assert "16 ranks become 8 between steps 2 and 6" in events
    assert f"adalora leaves {adapter.num_parameters:,} parameters in" in events
    read = ARCHITECTURES["llama"].build()
    lorica.load_adapter(read, tmp_path / "run/adapter", name="a")
    sample = ARCHITECTURES["llama"].sample(model, 2, 7)
    with torch.no_grad(), activate(model, "a"), activate(read, "a"):
        assert torch.equal(model(**sample).logits, read(**sample).logits)


def test_adalora_that_learnt_is_better_than_its_base(tmp_path):
    model = ARCHITECTURES["llama"].build()
    method = AdaLoRA(init_r=6, target_r=3, orth_reg_weight=0.1, target_modules="all-linear")
    attach(model, method, name="a")
    report = train(
        model,
        {"a": examples(1, 6)},
        TrainSettings(learning_rate=3e-2, max_steps=40, batch_size=6, eval_steps=10),
        output_dir=tmp_path / "run",
        eval_data=examples(1, 6),
        task=CausalLM.of(WordTokenizer()),
    )
    assert report.eval_loss["a"] is not None and report.eval_loss["a"] < 0.5 * math.log(97)


def test_adalora_is_cut_wherever_it_sits(tmp_path):
    """Also at an embedding and at weights that other code reads, which PEFT has not."""
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(23, 8),
            "mixed": nn.MultiheadAttention(8, 2, batch_first=True),
            "out": nn.Linear(8, 5),
            "inner": nn.ModuleDict({"out": nn.Linear(8, 5)}),
        }
    )
    targets = ("words", "mixed.in_proj_weight", "mixed.out_proj", "out")
    adapter = attach(model, AdaLoRA(init_r=3, target_r=1, target_modules=targets), name="a")
    assert len(adapter.slots) == 5
    with torch.no_grad():
        for number, slot in enumerate(adapter.slots.values()):
            slot.tensors["E"].copy_(torch.tensor([[0.0], [1.0], [2.0]]) * (number != 1))
            slot.tensors["E"][2] *= number % 2
    trainee = Trainee(adapter, TrainSettings(max_steps=4), 4)
    places = {path: slot.method for path, slot in adapter.slots.items()}
    layers = {plates.path: plates.layer for m in model.modules() for plates in plates_of(m)}
    before = {p: places[p].delta(dict(s.tensors), layers[p]) for p, s in adapter.slots.items()}
    Course(trainee, [], []).finish()
    ranks = {path: len(slot.tensors["E"]) for path, slot in adapter.slots.items()}
    assert sorted(ranks.values()) == [1, 1, 1, 2] and len(adapter.slots) == 4
    for path, slot in adapter.slots.items():
        after = slot.method.delta(dict(slot.tensors), layers[path])
        torch.testing.assert_close(after, before[path])
    lorica.save_adapter(adapter, tmp_path / "a")
    lorica.detach(model, "a")
    read = lorica.load_adapter(model, tmp_path / "a", name="b")
    assert {path: len(slot.tensors["E"]) for path, slot in read.slots.items()} == ranks
    assert read.method == adapter.method
    lorica.detach(model, "b")
    assert not any(plates_of(module) for module in model.modules())


def test_a_schedule_without_room_is_refused_before_training(tmp_path):
    model = ARCHITECTURES["llama"].build()
    attach(model, AdaLoRA(tinit=6, tfinal=4, init_r=4, target_r=2), name="a")
    with pytest.raises(ConfigError) as caught:
        train(
            model,
            {"a": examples(1, 17)},
            TrainSettings(max_steps=10),
            output_dir=tmp_path / "run",
            task=CausalLM.of(WordTokenizer()),
        )
    assert "tinit=6 and tfinal=4 leave none of the 10 steps" in str(caught.value)


def layers_that_move(steps, **settings):
    """For every step the layers whose copies changed, and how many moments there are of layers."""
    model = deep()
    method = LISA(**{"lisa_activated_layers": 2, "lisa_interval_steps": 3, **settings})
    adapter = attach(model, method, name="a")
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    trainee = Trainee(adapter, TrainSettings(learning_rate=1e-2, max_steps=steps, seed=1), steps)
    found = []
    for step in range(steps):
        before = {key: p.detach().clone() for key, p in adapter.named_parameters()}
        engine.step([trainee], [[examples(step, 3)]])
        moved = {key for key, p in adapter.named_parameters() if not torch.equal(p, before[key])}
        kept = {key for key, p in adapter.named_parameters() if p in trainee.optimizer.state}
        assert all(p.requires_grad for p in adapter.parameters())
        found.append((moved, kept, trainee.between.active(step)))
    return adapter, found


def deep(layers=5):
    """A model of enough layers to draw from."""
    config = ARCHITECTURES["llama"].build().config
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def test_lisa_trains_the_layers_drawn_and_the_ends():
    adapter, found = layers_that_move(12)
    for moved, kept, active in found:
        blocks = {block for key in moved if (block := block_of(key))}
        assert blocks == set(active) and len(blocks) == 2
        outside = {key for key, _ in adapter.named_parameters() if block_of(key) is None}
        assert {key for key in moved if block_of(key) is None} == outside
        assert len(outside) == 3  # embedding, last norm, head
        assert kept == moved  # the others have no moments
    draws = [active for _, _, active in found]
    assert all(draws[i] == draws[i - i % 3] for i in range(12))
    assert len({tuple(active) for active in draws}) > 1


def test_lisa_may_leave_the_ends_alone():
    adapter, found = layers_that_move(2, lisa_ends=False, last_layers=3)
    paths = [key for key, _ in adapter.named_parameters()]
    assert {block_of(path) for path in paths} == {f"model.layers.{i}" for i in (2, 3, 4)}
    assert all(len({block_of(key) for key in moved}) == 2 for moved, _, _ in found)


def test_moments_of_a_layer_begin_anew_when_it_comes_back():
    _, found = layers_that_move(30, lisa_activated_layers=1, lisa_interval_steps=2)
    again = [active[0] for _, _, active in found[::2]]
    assert any(block in again[:i] and again[i - 1] != block for i, block in enumerate(again))
    for moved, kept, active in found:
        assert {block_of(key) for key in kept} - {None} == set(active)
        assert moved == kept


def test_all_layers_have_their_turn_alike():
    held = {f"x.layers.{i}.w": (LISA(), {}) for i in range(6)}
    draws = Draws(LISA(lisa_activated_layers=2, lisa_interval_steps=1), held, 0)
    counts = Counter(block for step in range(600) for block in draws.active(step))
    assert len(counts) == 6 and all(150 < count < 250 for count in counts.values())
    assert draws.active(7) == Draws(draws.method, held, 0).active(7)
    assert [draws.active(i) for i in range(9)] != [
        Draws(draws.method, held, 1).active(i) for i in range(9)
    ]


@pytest.mark.parametrize("base", ["llama-tied", "gpt2", "t5"])
def test_a_tied_embedding_trains_as_one(base, tmp_path):
    arch = ARCHITECTURES[base]
    model = arch.build()
    adapter = attach(model, LISA(lisa_activated_layers=1), name="a")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    shared = [p for p in adapter.slots if model.get_submodule(p).weight is head.weight]
    assert len(shared) == (3 if base == "t5" else 2)
    first, *others = (adapter.slots[path].tensors for path in shared)
    assert all(other is first for other in others)
    assert sum(p is first["weight"] for p in adapter.parameters()) == 1
    sample = arch.sample(model, 2, 7)
    with torch.no_grad(), activate(model, "a"):
        start = arch.logits(model(**sample))
    with activate(model, "a"):
        arch.logits(model(**sample)).square().mean().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 0.1 * parameter.grad
        with activate(model, "a"):
            expected = arch.logits(model(**sample))
    assert (expected - start).abs().max() > 1e-4
    lorica.save_adapter(adapter, tmp_path / "a")
    again = arch.build()
    read = lorica.load_adapter(again, tmp_path / "a", name="b")
    assert read.num_parameters == adapter.num_parameters
    lorica.merge(model, "a")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(arch.logits(model(**sample)), expected)
        with activate(again, "b"):
            assert torch.equal(arch.logits(again(**sample)), expected)


def test_a_tied_embedding_stays_where_its_head_is_left_out():
    model = ARCHITECTURES["llama-tied"].build()
    adapter = attach(model, LISA(exclude_modules=("lm_head",)), name="a")
    assert not {"lm_head", "model.embed_tokens"} & adapter.slots.keys()
    assert "stay frozen" in adapter.reason


def test_too_few_layers_are_told_before_training(tmp_path):
    model = ARCHITECTURES["llama"].build()
    attach(model, LISA(lisa_activated_layers=3), name="a")
    with pytest.raises(ConfigError) as caught:
        train(
            model,
            {"a": examples(1, 17)},
            TrainSettings(max_steps=10),
            output_dir=tmp_path / "run",
            task=CausalLM.of(WordTokenizer()),
        )
    assert "lisa_activated_layers=3, but 2 layers" in str(caught.value)

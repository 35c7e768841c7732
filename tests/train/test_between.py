"""Methods that act between the steps: they go on to the same bits, and train beside others as
alone."""

import math

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.errors import ConfigError, Interrupted, NonFiniteError
from lorica.methods import AdaLoRA, LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine, Trainee
from lorica.train.loop import train
from train.runs import SETTINGS, outcome, stop_after
from train.words import WordTokenizer, examples

METHODS = {
    "adalora": AdaLoRA(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, target_modules=("q_proj", "up_proj")
    ),
}
every = pytest.mark.parametrize("kind", METHODS)
PLAIN = {**SETTINGS, "early_stopping_patience": None, "max_steps": 10}


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
    for step in (1, 3, 6, 7, 9):
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
    norm = model.get_submodule("model.norm").weight
    with torch.no_grad():
        norm.mul_(math.inf)
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

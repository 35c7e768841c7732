"""The trial of how many layers begin anew: as the run would train, and nothing is left."""

import copy

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.config import TrainSettings
from lorica.errors import ConfigError, TargetError
from lorica.methods import Selective
from lorica.tasks.text_classification import TextClassification
from lorica.train.trial import choose_top_layers
from train.words import fast_tokenizer


def setup():
    tokenizer = fast_tokenizer("<s> $A </s>", pad_token="<pad>")
    task = TextClassification(tokenizer, ("a", "b", "c"), None)
    rows = [
        {"text": f"w{5 + 3 * i % 40} w{6 + i % 7} w{50 + i % 3}", "label": "abc"[i % 3]}
        for i in range(36)
    ]
    examples = task.encode(rows).examples
    return ARCHITECTURES["bert"].build(), task, examples[:24], examples[24:]


SETTINGS = TrainSettings(learning_rate=3e-3, max_steps=6, eval_steps=2, batch_size=8, seed=2)


def test_each_candidate_is_judged_as_the_run_would_judge_it(tmp_path):
    model, task, train, held_out = setup()
    before = copy.deepcopy(model.state_dict())
    method = Selective(reinit_top_layers=(0, 1, 2))
    chosen, trial = choose_top_layers(model, method, task, train, held_out, SETTINGS)
    assert list(trial.losses) == [0, 1, 2] and len(set(trial.losses.values())) == 3
    assert chosen.reinit_top_layers == trial.best
    assert trial.losses[trial.best] == min(trial.losses.values())
    assert lorica.adapters(model) == {} and not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    adapter = lorica.attach(model, chosen, name="a", seed=SETTINGS.seed)
    report = lorica.train(
        model,
        {adapter: train},
        SETTINGS,
        eval_data=held_out,
        task=task,
        output_dir=tmp_path / "run",
    )
    assert report.eval_loss["a"] == trial.losses[trial.best]
    assert str(trial).startswith("the lowest eval loss of 0: ")


def test_what_cannot_be_tried_is_refused_and_nothing_stays():
    model, task, train, held_out = setup()
    with pytest.raises(ConfigError, match="there is nothing to choose"):
        choose_top_layers(model, Selective(), task, train, held_out, SETTINGS)
    several = Selective(reinit_top_layers=(0, 1))
    with pytest.raises(ConfigError, match="no records to evaluate on") as error:
        choose_top_layers(model, several, task, train, [], SETTINGS)
    assert "give eval_data" in str(error.value)
    with pytest.raises(TargetError, match="reinit_top_layers=7"):
        many = Selective(reinit_top_layers=(7, 0))
        choose_top_layers(model, many, task, train, held_out, SETTINGS)
    assert lorica.adapters(model) == {}


def test_a_caller_may_leave():
    model, task, train, held_out = setup()
    calls = []

    def leave():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose_top_layers(
            model,
            Selective(reinit_top_layers=(0, 1)),
            task,
            train,
            held_out,
            SETTINGS,
            between=leave,
        )
    assert lorica.adapters(model) == {}

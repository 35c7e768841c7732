"""Candidates in training: bits as alone, comparisons that no order decides, kills and resumes."""

import shutil

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.errors import ConfigError, Interrupted
from lorica.methods import WORDS
from lorica.methods.lora import LoRA
from lorica.search.field import Course, Field, by_record
from lorica.search.halving import rung_steps
from lorica.search.space import read_space
from lorica.search.study import Study
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine
from lorica.train.loop import train
from train.runs import rows
from train.words import WordTokenizer, examples

TRAIN = {"batch_size": 3, "max_steps": 8, "eval_steps": 2, "save_steps": 2, "logging_steps": 4}
SECTION = {"r": [2, 5, 3], "learning_rate": [3e-2, 1e-3], "rungs": [0.25, 0.5]}


class Search:
    """A search on a tiny model, as `lorica search` puts it together."""

    def __init__(self, folder, *, section=None, at_once=3, run="run", data=17):
        self.folder = folder / run
        space = read_space(section or SECTION, methods=WORDS, default_method="lora", given={})
        self.study = Study(
            str(folder / "study.db"), space, seed=0, identity={}, run=str(self.folder)
        )
        self.model = ARCHITECTURES["llama"].build()
        self.train = TrainSettings(**TRAIN)
        self.task = CausalLM.of(WordTokenizer())
        self.told = []
        course = Course(
            examples=examples(1, data),
            held_out=examples(3, 7),
            total=8,
            rungs=rung_steps(space.how.rungs, 8, 2),
            at_once=at_once,
        )
        self.field = Field(
            self.model,
            self.study,
            course,
            self.made,
            seed=4,
            task=self.task,
            tell=lambda kind, text: self.told.append(text),
        )

    def made(self, point):
        init = point.get("init_lora_weights", "kaiming")
        more = {"init_records": 4} if init in ("eva", "lora_ga") else {}
        method = LoRA(
            r=point.get("r", 2), init_lora_weights=init, target_modules="all-linear", **more
        )
        rate = point.get("learning_rate", 1e-2)
        return method, TrainSettings(**TRAIN, learning_rate=rate)

    def go(self, *, resume=False):
        how = {"output_dir": self.folder, "task": self.task, "director": self.field}
        return train(self.model, {}, self.train, resume=resume, **how)

    def tensors(self, number):
        named = self.field.handles[number].named_parameters()
        return {key: tensor.detach().clone() for key, tensor in named}


def told(study):
    """What a study holds, without where."""
    return [
        (e.number, e.point, e.outcome, e.reason, e.curve, e.best_step, e.losses, e.decided)
        for e in study.entries()
    ]


def test_candidates_are_bitwise_what_they_would_be_alone(tmp_path):
    search = Search(tmp_path)
    search.go()
    finished = [e for e in search.study.entries() if e.outcome == "finished"]
    assert finished and {e.outcome for e in search.study.entries()} == {"finished", "cut"}
    for entry in finished:
        alone = ARCHITECTURES["llama"].build()
        method, settings = search.made(entry.point)
        adapter = attach(alone, method, name="x", seed=4)
        how = {"output_dir": tmp_path / entry.name, "task": search.task}
        train(alone, {adapter: examples(1, 17)}, settings, eval_data=examples(3, 7), **how)
        expected = dict(adapter.named_parameters())
        for key, tensor in search.tensors(entry.number).items():
            assert torch.equal(tensor, expected[key]), (entry.name, key)


def test_all_of_a_turn_are_compared_whichever_is_asked_first(tmp_path):
    section = {"rungs": [0.25], "hopeless": False}
    found = []
    for name, rates in (("up", [1e-5, 3e-2]), ("down", [3e-2, 1e-5])):
        (tmp_path / name).mkdir()
        search = Search(tmp_path / name, section={**section, "learning_rate": rates})
        search.go()
        entries = search.study.entries()
        found.append({e.point["learning_rate"]: (e.outcome, e.last_step) for e in entries})
    assert found[0] == found[1]
    assert sorted(found[0].values()) == [("cut", 2), ("finished", 8)]


def test_the_rest_follows_as_others_end(tmp_path):
    search = Search(tmp_path, at_once=2)
    report = search.go()
    assert len(report.steps) == 6
    training = {}
    for row in rows(search.folder):
        training.setdefault(row.get("turn", row["step"]), set()).add(row["adapter"])
    assert max(map(len, training.values())) == 2


class Killed(BaseException):
    """The process is gone: nothing that would be done at its end is done."""


@pytest.mark.parametrize("turn", [1, 4, 9])
def test_a_killed_search_goes_on_to_the_same_study_and_bits(tmp_path, monkeypatch, turn):
    (tmp_path / "whole").mkdir()
    whole = Search(tmp_path / "whole", at_once=2)
    whole.go()
    (tmp_path / "killed").mkdir()
    killed, calls = Search(tmp_path / "killed", at_once=2), []
    original = Engine.step

    def step(self, trainees, work):
        calls.append(1)
        if len(calls) == turn:
            shutil.copytree(killed.folder, tmp_path / "killed" / "left")  # as the disk is now
            raise Killed
        return original(self, trainees, work)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "step", step)
        killed.go()
    shutil.rmtree(killed.folder)
    shutil.move(tmp_path / "killed" / "left", killed.folder)
    again = Search(tmp_path / "killed", at_once=2)
    again.go(resume=True)
    assert told(again.study) == told(whole.study)
    for entry in whole.study.entries():
        if entry.outcome == "finished":
            first, second = whole.tensors(entry.number), again.tensors(entry.number)
            assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_machines_share_the_candidates_and_the_comparison(tmp_path):
    first = Search(tmp_path, run="one")
    second = Search(tmp_path, run="two")
    half = first.field._next

    def three(present):  # the first machine takes three, the second the rest
        return half(present) if len(first.study.own()) < 3 else None

    first.field._next = three
    first.go()
    second.go()
    runs = [e.run for e in second.study.entries()]
    assert [run.rpartition("/")[2] for run in runs] == ["one"] * 3 + ["two"] * 3
    reasons = [e.reason for e in second.study.entries() if "of 6 at step 2" in e.reason]
    assert reasons or all(e.outcome == "finished" for e in second.study.entries()[3:])


def test_a_candidate_that_cannot_work_is_told_and_the_others_train(tmp_path):
    search = Search(tmp_path, section={"r": [2, 999]})
    search.go()
    found = search.study.entries()
    assert [e.outcome for e in found] == ["finished", "failed"]
    assert "r=999 is more than the layer's own rank" in found[1].reason
    assert any("c001 (rank 999) cannot be trained" in text for text in search.told)


def test_a_candidate_whose_numbers_break_fails_alone(tmp_path, monkeypatch):
    search = Search(tmp_path, section={"r": [2, 3], "hopeless": False, "rungs": []})
    original = Engine.step

    def step(self, trainees, work):
        for trainee in trainees:
            if trainee.adapter.name == "c001" and trainee.step == 3:
                with torch.no_grad():
                    next(trainee.adapter.parameters()).fill_(float("nan"))
        return original(self, trainees, work)

    monkeypatch.setattr(Engine, "step", step)
    search.go()
    assert [e.outcome for e in search.study.entries()] == ["finished", "failed"]
    assert "not finite" in search.study.entry(1).reason


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_starts_that_records_or_weights_decide_can_be_compared(tmp_path, init):
    section = {"init": ["kaiming", init], "hopeless": False, "rungs": []}
    search = Search(tmp_path, section=section)
    search.go()
    assert [e.outcome for e in search.study.entries()] == ["finished", "finished"], search.told


def test_ctrl_c_leaves_a_search_that_goes_on(tmp_path, monkeypatch):
    from train.runs import stop_after

    search = Search(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 3)
        search.go()
    again = Search(tmp_path)
    again.go(resume=True)
    assert {e.outcome for e in again.study.entries()} == {"finished", "cut"}


def test_a_candidate_that_is_gone_from_the_settings_is_named(tmp_path):
    search = Search(tmp_path)
    search.study.claim()
    search.field.settings_of = lambda point: (_ for _ in ()).throw(ConfigError("no such method"))
    with pytest.raises(ConfigError, match="c000 cannot be attached any more"):
        search.field.again("c000")


def test_examples_of_one_record_count_as_one():
    assert by_record((1.0, 2.0, 4.0), (3, 5, 7), (0, 1, 0)) == ([5.0, 2.0], [10, 5])

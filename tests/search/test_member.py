"""Several processes on one search: whoever trains what, in any order, the study is the same."""

import math
import random
from contextlib import ExitStack

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.attach import detach
from lorica.config import TrainSettings
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import WORDS
from lorica.methods.lora import LoRA
from lorica.records.atomic import write_file
from lorica.records.crew import Crew
from lorica.records.folder import json_text
from lorica.search.field import Course, Field, number_of
from lorica.search.member import Member, lost
from lorica.search.schedule import Schedule, training
from lorica.search.space import read_space
from lorica.search.study import Study
from lorica.tasks.causal_lm import CausalLM
from lorica.train.director import LATER, Evaluation
from lorica.train.loop import train
from search.test_field import Search, told
from train.words import WordTokenizer

EVERY, TOTAL, RUNGS = 2, 8, (2, 4)
WIDE = {"r": [2, 3, 5, 999], "learning_rate": [3e-2, 1e-3], "rungs": [0.25, 0.5]}


class Worker:
    """A process of a search, as far as a study sees one: candidates step when it is told to, and
    their losses are made up.
    """

    def __init__(self, folder, *, size, at_once, room=None):
        space = read_space(WIDE, methods=WORDS, default_method="lora", given={})
        self.crew = Crew(folder, size)
        with self.crew.locked():
            self.study = Study(
                str(folder / "study.db"), space, seed=0, identity={}, run=str(folder)
            )
        self.schedule = Schedule(self.study, at_once, EVERY, TOTAL, RUNGS)
        self.member, self.room, self.handed, self.here = None, room, {}, ExitStack()

    def begin(self):
        """Look for work; whether there was some."""
        with self.crew.locked():
            entries = self.schedule.advance()
            owners = self.crew.owners()
            if not lost(self.crew, entries) and all(e.name in owners for e in training(entries)):
                return False
            self.folder = self.crew.begin()
        course = Course((), (), TOTAL, RUNGS, self.schedule.at_once)
        field = Field(
            ARCHITECTURES["llama"].build(),
            self.study,
            course,
            lambda point: (
                LoRA(r=point["r"], target_modules="all-linear"),
                TrainSettings(max_steps=TOTAL),
            ),
            seed=0,
            task=CausalLM.of(WordTokenizer()),
        )
        how = {"room": self.room}
        self.member = Member(field, self.schedule, self.crew, self.folder, **how)
        self.steps, self.ended, self.waiting = {}, {}, {}
        if not self.member.begin():
            self.close()
        return True

    def turn(self):
        """What the loop of a run does in a turn; whether it is still at work."""
        for name, evaluation in list(self.waiting.items()):
            self.hear(name, evaluation)
        standing = {name: self.ended.get(name) for name in self.steps}
        self.member._looked = -math.inf
        self.member._asked = dict.fromkeys(self.member._asked, -math.inf)
        self.hand_on()
        names = [newcomer.adapter.name for newcomer in self.member.newcomers(standing)]
        self.steps |= {name: self.handed.get(name, 0) for name in names}
        for name in [n for n in self.steps if n not in self.waiting and n not in self.ended]:
            self.steps[name] += 1
            if self.steps[name] % EVERY == 0:
                self.hear(name, evaluation_of(name, self.steps[name]))
        if self.steps.keys() == self.ended.keys() and not self.waiting:
            write_file(self.folder.manifest, json_text({"training": {"steps": self.steps}}))
            for name in self.steps:
                adapter = self.member.field.handles[number_of(name)]
                save_adapter(adapter, self.folder.adapter(name))
            self.close()

    def hand_on(self):
        """Let those go whom others are to have; their steps are known to all."""
        self.member._counted = -math.inf
        working = [n for n in self.steps if n not in self.waiting and n not in self.ended]
        for name in self.member.leaving(working):
            self.handed[name] = self.steps.pop(name)
            self.member.left(name)

    def hear(self, name, evaluation):
        reason = self.member.judge(evaluation)
        self.waiting.pop(name, None)
        if reason is LATER:
            self.waiting[name] = evaluation
        elif reason or evaluation.step == TOTAL:
            self.ended[name] = reason or "all 8 steps are done"

    def close(self):
        """The end, or the death, of a process."""
        self.folder.close()
        self.member = None


def evaluation_of(name, step):
    rng = random.Random(f"{name} {step // 4}")
    losses = tuple(6.0 - math.log(1 + step) * rng.uniform(0.5, 1.5) + rng.random() for _ in "abc")
    scores = {"eval_loss": sum(losses) / 15}
    return Evaluation(name, step, TOTAL, scores, True, losses, (5, 5, 5), (0, 1, 2))


def simulated(folder, *, size, at_once=3, seed=0, deaths=(), handed=None):
    """A search by `size` processes whose turns come in any order; some die at some of them.

    Args:
        handed: gets the steps of those who went from one process to another.
    """
    folder.mkdir()
    workers = [Worker(folder, size=size, at_once=at_once) for _ in range(size)]
    rng, number, handed = random.Random(seed), 0, {} if handed is None else handed
    for worker in workers:
        worker.handed = handed
        worker.here.enter_context(worker.crew.present())
    while True:
        number += 1
        assert number < 3000, "nobody comes any further"
        worker = rng.choice(workers)
        if number in deaths and len(workers) > 1:
            if worker.member:
                worker.close()
            worker.here.close()
            workers.remove(worker)
        elif worker.member:
            worker.turn()
        elif not worker.begin() and not any(one.member for one in workers):
            break
    for one in workers:
        one.here.close()
    entries = worker.study.entries()
    assert all(worker.crew.adapter(e.name, worker.crew.owners().get(e.name)) for e in entries[:6])
    return told(worker.study), [entry.joined for entry in entries]


def test_who_trains_what_in_which_order_changes_nothing(tmp_path):
    alone = simulated(tmp_path / "alone", size=1)
    outcomes = [row[2] for row in alone[0]]
    assert outcomes[6:] == ["failed"] * 2 and {"cut", "finished"} == set(outcomes[:6])
    assert len({*alone[1]}) > 2  # some had to wait for room
    for size, seed in ((2, 1), (5, 4)):
        assert simulated(tmp_path / f"{size}-{seed}", size=size, seed=seed) == alone


def test_who_has_much_to_do_hands_candidates_on(tmp_path):
    alone, handed = simulated(tmp_path / "alone", size=1, at_once=6), {}
    assert simulated(tmp_path / "3", size=3, at_once=6, seed=2, handed=handed) == alone
    assert handed and all(handed.values())  # after some steps
    (tmp_path / "run").mkdir()
    first, second = (Worker(tmp_path / "run", size=1, at_once=6) for _ in range(2))
    with first.crew.present(), ExitStack() as later:
        assert first.begin()
        first.turn()
        assert len(first.steps) == 6  # nobody else is there
        later.enter_context(second.crew.present())
        first.turn()
        assert len(first.steps) == 3 and len(first.handed) == 3
        assert second.begin()
        second.turn()
        assert second.steps.keys() == first.handed.keys()


def test_the_candidates_of_the_dead_are_taken_up(tmp_path):
    alone = simulated(tmp_path / "alone", size=1)
    for seed, deaths in ((1, (7,)), (4, (25, 60, 61))):
        found = simulated(tmp_path / str(seed), size=4, seed=seed, deaths=deaths)
        assert found == alone, seed


def test_everybody_at_once_is_split_evenly(tmp_path):
    (tmp_path / "run").mkdir()
    first, second = (Worker(tmp_path / "run", size=2, at_once=6) for _ in range(2))
    assert first.begin() and second.begin()
    shares = [one.member.newcomers({}) for one in (first, second)]
    assert [[n.adapter.name for n in share] for share in shares] == [
        ["c000", "c001", "c002"],
        ["c003", "c004", "c005"],
    ]


def test_no_process_takes_more_than_fit(tmp_path):
    (tmp_path / "run").mkdir()
    worker = Worker(tmp_path / "run", size=1, at_once=6, room=2)
    assert worker.begin() and len(worker.member.newcomers({})) == 2


def test_who_rests_is_not_asked_about_all_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lorica.search.member.LOOK_EVERY", 1e9)  # however slow the machine is
    (tmp_path / "run").mkdir()
    first, second = (Worker(tmp_path / "run", size=2, at_once=6) for _ in range(2))
    assert first.begin() and second.begin()
    for worker in (first, second):
        worker.turn()
        worker.turn()
    name, evaluation = next(iter(first.waiting.items()))
    assert first.member.judge(evaluation) is LATER
    first.member._asked[name] = -math.inf
    assert first.member.judge(evaluation) is not LATER


@pytest.mark.parametrize("at_once", [2, 6])
def test_a_schedule_is_that_of_one_process(tmp_path, at_once):
    (tmp_path / "field").mkdir()
    alone = Search(tmp_path / "field", at_once=at_once)
    alone.go()
    folder = tmp_path / "crew"
    folder.mkdir()
    own = Search(folder, at_once=at_once, run="unused")
    study = Study(str(folder / "own.db"), own.study.space, seed=0, identity={}, run=str(folder))
    own.field.study = study
    schedule = Schedule(study, at_once, EVERY, TOTAL, own.field.course.rungs)
    crew = Crew(folder, 1)
    with crew.locked():
        schedule.advance()
        stretch = crew.begin()
    member = Member(own.field, schedule, crew, stretch)
    assert member.begin()
    with stretch:
        how = {"output_dir": stretch, "task": own.task, "director": member}
        train(own.model, {}, own.train, **how)
    expected = told(alone.study)
    for row, wanted in zip(told(study), expected, strict=True):
        assert row[:-1] == wanted[:-1]
        assert {k: v for k, v in row[-1].items() if k != TOTAL} == wanted[-1]
    for entry in study.entries():
        detach(own.model, entry.name)
        read = dict(
            load_adapter(own.model, crew.adapter(entry.name, stretch.path)).named_parameters()
        )
        for key, tensor in alone.tensors(entry.number).items():
            assert torch.equal(read[key], tensor)
        detach(own.model, "default")


def test_one_whose_numbers_break_makes_room_for_the_next(tmp_path):
    (tmp_path / "run").mkdir()
    worker = Worker(tmp_path / "run", size=1, at_once=2)
    assert worker.begin()
    worker.turn()
    worker.ended["c000"] = "adapter 'c000', step 2: the loss is not finite"
    worker.steps.pop("c000")
    worker.steps["c000"] = 1
    while worker.member:
        worker.turn()
    found = worker.study.entries()
    assert found[0].outcome == "failed" and "not finite" in found[0].reason
    assert found[2].joined == EVERY and found[2].outcome in ("cut", "finished")

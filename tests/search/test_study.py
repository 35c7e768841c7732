"""The study: claimed once, resumed after a kill, shared, and never asked the same thing twice."""

import math
import sys

import pytest

from lorica.errors import ConfigError, LoricaError, MissingPackage
from lorica.methods import WORDS
from lorica.search.space import read_space
from lorica.search.study import Study

SECTION = {"r": [4, 8], "learning_rate": [1e-4, 3e-4]}
TOKENS = (3, 5)


def study(tmp_path, section=None, *, run="one", identity=None, seed=0):
    found = read_space(section or SECTION, methods=WORDS, default_method="lora", given={})
    return Study(
        str(tmp_path / "study.db"), found, seed=seed, identity=identity or {"data": "x"}, run=run
    )


def report(own, number, step, losses=(3.0, 5.0), *, kept=True, rung=False):
    loss = sum(losses) / sum(TOKENS)
    own.report(number, step, loss, losses=losses, tokens=TOKENS, kept=kept, rung=rung)


def test_the_candidates_of_a_grid_are_claimed_in_order_and_once(tmp_path):
    own = study(tmp_path)
    points = [own.claim().point for _ in range(4)]
    assert points == [{"r": r, "learning_rate": rate} for r in (4, 8) for rate in (1e-4, 3e-4)]
    assert own.claim() is None
    assert [entry.outcome for entry in own.entries()] == ["training"] * 4
    assert [entry.name for entry in own.own()] == ["c000", "c001", "c002", "c003"]


def test_two_runs_share_the_candidates(tmp_path):
    first, second = study(tmp_path), study(tmp_path, run="two")
    taken = [one.claim().number for one in (first, second, first, second)]
    assert sorted(taken) == [0, 1, 2, 3]
    assert first.claim() is None and second.claim() is None
    assert len(first.own()) == len(second.own()) == 2
    assert len(first.entries()) == 4


def test_what_was_claimed_is_there_again_after_the_process_died(tmp_path):
    own = study(tmp_path)
    own.claim()
    report(own, 0, 5, rung=True)
    own.decide(0, 5, "")
    again = study(tmp_path)
    (entry,) = again.own()
    assert entry.number == 0 and entry.curve == {5: 1.0} and entry.rungs == {5: (3.0, 5.0)}
    assert again.decision(0, 5) == "" and again.decision(0, 10) is None
    assert again.claim().number == 1


def test_a_candidate_taken_without_a_word_by_a_run_that_was_killed_is_taken_up(tmp_path):
    own = study(tmp_path)
    own._study.ask()  # the process ends here, before it has said whose it is
    assert [study(tmp_path).claim().number for _ in range(2)] == [0, 1]


def test_an_interrupted_beginning_is_completed(tmp_path):
    whole = study(tmp_path)
    points = [entry.point for entry in whole.entries()]
    torn = tmp_path / "torn"
    torn.mkdir()
    begun = study(torn)
    begun._study.set_user_attr("identity", None)  # as a kill between the queue and the mark leaves
    assert [entry.point for entry in study(torn).entries()] == points


def test_the_same_evaluation_again_changes_nothing(tmp_path):
    own = study(tmp_path)
    own.claim()
    for _ in range(2):
        report(own, 0, 5, (3.0, 5.0))
        report(own, 0, 10, (2.0, 4.0))
        report(own, 0, 15, (2.5, 4.5), kept=False)
        own.end(0, "finished")
    entry = own.entry(0)
    assert entry.curve == {5: 1.0, 10: 0.75, 15: 0.875}
    assert (entry.outcome, entry.best_step, entry.losses) == ("finished", 10, (2.0, 4.0))
    assert entry.loss == 0.75


def test_outcomes_are_told_with_their_reasons(tmp_path):
    own = study(tmp_path)
    for _ in range(3):
        own.claim()
    own.describe(0, parameters=128, rank=4)
    report(own, 0, 5)
    own.end(0, "cut", reason="worse than half")
    own.end(1, "failed", reason="r=4 is more than the layer has")
    report(own, 2, 5)
    own.end(2, "finished")
    found = [(e.outcome, e.reason) for e in own.entries()]
    assert found == [
        ("cut", "worse than half"),
        ("failed", "r=4 is more than the layer has"),
        ("finished", ""),
        ("waiting", ""),
    ]
    assert own.entry(0).parameters == 128 and own.entry(0).rank == 4


def test_a_loss_that_is_not_finite_is_kept_out_of_the_study(tmp_path):
    own = study(tmp_path)
    own.claim()
    own.end(0, "finished")
    assert own.entry(0).outcome == "failed" and own.entry(0).loss is None


def test_a_sampler_of_optuna_asks_and_listens_to_what_it_is_told(tmp_path):
    section = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "r": {"low": 2, "high": 16},
        "sampler": "tpe",
        "candidates": 12,
    }
    asked = []
    for best in (1e-4, 1e-2):  # the same search, where another rate is the best
        folder = tmp_path / f"{best}"
        folder.mkdir()
        own, points = study(folder, section), []
        while (entry := own.claim()) is not None:
            points.append(entry.point)
            distance = abs(math.log(entry.point["learning_rate"] / best))
            report(own, entry.number, 5, (distance, 1.0))
            own.end(entry.number, "finished")
        asked.append(points)
    assert len(asked[0]) == 12 and all(1e-4 <= p["learning_rate"] <= 1e-2 for p in asked[0])
    assert asked[0][:10] == asked[1][:10]  # by chance, until it has seen ten
    assert asked[0][10:] != asked[1][10:]


def test_a_study_of_something_else_is_refused_with_what_differs(tmp_path):
    study(tmp_path, identity={"data": "x", "model": "m"})
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, identity={"data": "y", "model": "m"})
    assert list(caught.value.problems) == ['data is "y", and the study has "x"']


def test_candidates_judged_on_other_records_are_refused(tmp_path):
    own = study(tmp_path)
    own.claim()
    report(own, 0, 5)
    with pytest.raises(LoricaError, match="different records"):
        own.report(0, 10, 1.0, losses=(1.0,), tokens=(9,), kept=True, rung=False)


def test_without_optuna_the_message_is_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackage) as caught:
        study(tmp_path)
    assert caught.value.mend == "pip install 'lorica[search]'"

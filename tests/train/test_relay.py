"""Adapters that go from one run to another: the bits of a run alone, wherever they go on."""

import hashlib
import json
import signal

import pytest

from lorica.attach.attach import attach, detach
from lorica.attach.handle import adapters
from lorica.config import TrainSettings
from lorica.errors import CheckpointError, Interrupted
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.director import LATER
from lorica.train.loop import train
from train.runs import SETTINGS, model_with, rows, run, stop_after
from train.words import WordTokenizer, examples

DATA = {"a": examples(1, 17), "b": examples(2, 11)}
HELD_OUT = examples(3, 7)


class Hand:
    """Hands adapters on after given steps; one may rest for ever."""

    def __init__(self, states, model, *, leave=(), rests=()):
        self.states, self.model, self.leave, self.rests = states, model, dict(leave), dict(rests)
        self.turns, self.heard, self.gone = -2, [], []  # asked twice before the first turn

    def leaving(self, working):
        self.turns += 1
        return [name for name in working if self.leave.get(name) == self.turns]

    def left(self, name):
        detach(self.model, name)
        self.gone.append(name)

    def judge(self, evaluation):
        self.heard.append(evaluation)
        return LATER if self.rests.get(evaluation.name) == evaluation.step else None

    def newcomers(self, standing):
        return []

    @property
    def state(self):
        return {}


def part(folder, names, **how):
    """A run of some of the adapters beside others; returns who handed on, and what it came to."""
    model = model_with()
    for name in names:
        i = "ab".index(name)
        method = LoRA(r=3 + i, target_modules="all-linear", lora_dropout=0.1)
        attach(model, method, name=name, seed=i)
    changes = how.pop("changes", {})
    hand = Hand(folder.parent / "states", model, **how)
    report = train(
        model,
        {name: DATA[name] for name in names},
        TrainSettings(**{**SETTINGS, **changes}),
        output_dir=folder,
        eval_data=HELD_OUT,
        task=CausalLM.of(WordTokenizer()),
        director=hand,
        relay=hand,
    )
    return hand, report


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder)
    return folder


def check(alone, *folders, names="ab"):
    """Adapters and rows of some runs together are those of the one."""
    told = {}
    for folder in folders:
        for row in rows(folder):
            row.pop("turn", None)
            told[row["adapter"], row["step"]] = row
        for own in folder.glob("adapters/*"):
            same = alone / "adapters" / own.name / "adapter_model.safetensors"
            assert (own / same.name).read_bytes() == same.read_bytes(), own
    wanted = [row for row in rows(alone) if row["adapter"] in names]
    assert [told[row["adapter"], row["step"]] for row in wanted] == wanted
    assert len(told) == len(wanted)


def events(folder):
    return "\n".join(
        json.loads(line)["text"] for line in (folder / "events.jsonl").read_text().splitlines()
    )


@pytest.mark.parametrize("step", [1, 4, 7])
def test_whoever_goes_on_trains_to_the_same_bits(tmp_path, alone, step):
    hand, report = part(tmp_path / "1", "ab", leave={"b": step})
    assert hand.gone == ["b"] and list(report.steps) == ["a"] and [*adapters(hand.model)] == ["a"]
    assert f"b is handed on after step {step}" in events(tmp_path / "1")
    _, second = part(tmp_path / "2", "b")
    assert f"b: going on from step {step}" in events(tmp_path / "2")
    check(alone, tmp_path / "1", tmp_path / "2")
    assert not (tmp_path / "1/checkpoints").exists()
    whole = sum(one.tokens_per_second * one.seconds for one in (report, second))
    assert whole == pytest.approx(sum(tokens_of(alone).values()))


def tokens_of(folder):
    """Tokens that each adapter has seen."""
    return {row["adapter"]: row["tokens"] for row in rows(folder)}


@pytest.mark.parametrize("step", [4, 7])
def test_a_stopped_run_leaves_states_that_any_other_goes_on_from(
    tmp_path, alone, monkeypatch, step
):
    with monkeypatch.context() as patch:
        stop_after(patch, step, signal.SIGTERM)  # step 4 is evaluated: that is left
        with pytest.raises(Interrupted):
            part(tmp_path / "1", "ab")
    assert [*(tmp_path / "states/a").iterdir()][-1].name == f"step-{step:08d}"
    part(tmp_path / "2", "b")
    part(tmp_path / "3", "a")
    check(alone, tmp_path / "1", tmp_path / "2", tmp_path / "3")
    hand, report = part(tmp_path / "4", "ab")  # states of the end: nothing is left to do
    assert report.seconds == 0 and not hand.heard
    check(alone, *(tmp_path / name for name in "1234"))


def test_an_evaluation_that_waits_for_its_judge_goes_along(tmp_path, alone, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interrupted):
            part(tmp_path / "1", "ab", rests={"b": 6})
    first, _ = part(tmp_path / "2", "b", rests={"b": 99})
    assert first.heard[0].name == "b" and first.heard[0].step == 6
    part(tmp_path / "3", "a")
    check(alone, tmp_path / "1", tmp_path / "2", tmp_path / "3")


def test_a_state_that_is_of_no_use_is_told_of(tmp_path, alone):
    part(tmp_path / "1", "ab", leave={"b": 4})
    newest = tmp_path / "states/b/step-00000004"
    (newest / "optimizers/b.safetensors").write_bytes(b"torn")
    part(tmp_path / "2", "b")
    assert "b begins anew, for its state is of no use: no checkpoint" in events(tmp_path / "2")
    check(alone, tmp_path / "1", tmp_path / "2")
    part(tmp_path / "3", "b", changes={"learning_rate": 1e-3})
    assert "belongs to another run; settings.learning_rate" in events(tmp_path / "3")
    kept = [*(tmp_path / "states").glob(".bad-b-*/step-*")]
    assert kept, "a state that is of no use here may be of use to whoever wrote it"


def test_a_state_of_another_version_stays(tmp_path):
    part(tmp_path / "1", "ab", leave={"b": 4})
    path = tmp_path / "states/b/step-00000004/MANIFEST.json"
    manifest = json.loads(path.read_text()) | {"schema": 99}
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(rest | {"sha256": digest}))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="schema 99"):
        part(tmp_path / "2", "b")
    assert path.read_bytes() == before


def test_a_state_that_cannot_be_read_now_stays(tmp_path):
    part(tmp_path / "1", "ab", leave={"b": 4})
    newest = tmp_path / "states/b/step-00000004/MANIFEST.json"
    newest.unlink()
    newest.symlink_to(newest.name)  # too many levels of links
    with pytest.raises(CheckpointError, match="can be read"):
        part(tmp_path / "2", "b")
    assert newest.is_symlink()

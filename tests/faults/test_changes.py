"""F-18 to F-20, F-22, F-23: what was changed between two tries of a run."""

import os
import shutil
import signal

import pytest
import torch

from faults import rig
from faults.scenarios import PHASES
from lorica.config import TrainSettings
from lorica.errors import Interrupted
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine
from lorica.train.identity import COSMETIC, MEMORY, circumstances, identity
from lorica.train.plan import courses_of
from train.runs import model_with, outcome, run, stop_after
from train.words import WordTokenizer, examples

# --- F-20: every setting has a class --------------------------------------------------------------

OTHER = {
    "learning_rate": 2e-3,
    "max_steps": 11,
    "epochs": 7.0,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "dtype": "float32",
    "packing": False,
    "early_stopping_patience": 3,
    "decay_ratio": 0.3,
    "max_length": 48,
    "optim": "adamw_8bit",
    "reuse_frozen_layers": "memory",
}
BASIC = {"learning_rate": 1e-3, "max_steps": 9}


def other(name):
    """Another value that the setting takes, or None where there is none to be found."""
    field = TrainSettings.model_fields[name]
    value = BASIC.get(name, field.default)
    if name in OTHER:
        return OTHER[name]
    for candidate in (not value if isinstance(value, bool) else None, 2, 3, 0.05, 0.5, 48):
        if (
            candidate is None
            or candidate == value
            or (isinstance(candidate, bool) is False and (isinstance(value, bool)))
        ):
            continue
        try:
            TrainSettings(**{**BASIC, name: candidate})
        except Exception:
            continue
        return candidate
    return None


def known_by(settings):
    model = model_with("a")
    task = CausalLM.of(WordTokenizer(), max_length=settings.max_length)
    courses = courses_of(model, task, {"a": examples(1, 7)}, {"a": examples(2, 3)}, settings)[0]
    return identity(model, task, courses, settings), circumstances(model, settings)


@pytest.mark.parametrize("name", TrainSettings.model_fields)
def test_every_setting_is_cosmetic_told_or_refused(name):
    changed = other(name)
    if changed is None:
        pytest.fail(f"{name}: the test knows no other value")
    more = {"lr_scheduler_type": "wsd"} if name == "decay_ratio" else {}
    before = known_by(TrainSettings(**{**BASIC, **more}))
    try:
        after = known_by(TrainSettings(**{**BASIC, **more, name: changed}))
    except Exception as error:
        pytest.skip(f"it cannot be changed alone: {error}")
    if name in COSMETIC:
        assert before == after
    elif name in MEMORY:
        assert before[1] != after[1]
    else:
        assert before[0] != after[0]


# --- F-18, F-19 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "size", "number"), [(2, 2, 3), (4, 1, 6), (5, 3, 2)])
def test_smaller_batches_in_the_same_step_go_on(tmp_path, monkeypatch, step, size, number):
    """Every record exactly once in each epoch, whatever was changed where; and it is told."""
    seen = []
    real = Engine.step

    def noted(self, trainees, work):
        seen.append([e.row for batch in work[0] for e in batch])
        return real(self, trainees, work)

    monkeypatch.setattr(Engine, "step", noted)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", data={"a": examples(1, 17), "b": examples(2, 11)})
    changes = {"batch_size": size, "gradient_accumulation_steps": number}
    run(tmp_path / "run", resume=True, **changes)
    epoch = sorted(row for rows in seen[:3] for row in rows)
    assert epoch == list(range(17))
    assert sorted(row for rows in seen[3:6] for row in rows) == list(range(17))
    told = "another batch_size (3 before" in (tmp_path / "run/events.jsonl").read_text()
    assert told is (size != 3)


def test_other_threads_stay_close(tmp_path, monkeypatch):
    """F-19: allowed and told (tests/train/test_resume.py); the result stays within 1e-4."""
    run(tmp_path / "whole", max_steps=6)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", max_steps=6)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(tmp_path / "run", max_steps=6, resume=True)
    finally:
        torch.set_num_threads(before)
    pairs = zip(outcome(tmp_path / "whole")[2], outcome(tmp_path / "run")[2], strict=True)
    for one, two in pairs:
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert "another number of threads (" in (tmp_path / "run/events.jsonl").read_text()


# --- F-22, F-23 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(own_rig):
    """A run that was stopped at step 8."""
    folder = own_rig.folder()
    trap = lambda: PHASES["step"](lambda: os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    assert rig.finished(own_rig.words(folder), own_rig.output, before=trap).code == 143
    return folder


EDITS = {
    "append": lambda rows: [*rows, rows[0]],
    "delete": lambda rows: rows[1:],
    "reorder": lambda rows: [rows[1], rows[0], *rows[2:]],
    "one byte": lambda rows: [{**rows[0], "completion": rows[0]["completion"] + " w7"}, *rows[1:]],
    "duplicate": lambda rows: [rows[0], rows[0], *rows[2:]],
}


@pytest.mark.parametrize("edit", [*EDITS, "newlines", "time", "name"])
def test_other_records(own_rig, stopped, tmp_path, edit):
    """F-23: other records are refused with the kind of change; other bytes are not."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    rows = rig.read_records(own_rig.place / "records.jsonl")
    data = tmp_path / ("other name.jsonl" if edit == "name" else "records.jsonl")
    edited = EDITS.get(edit, lambda rows: rows)(rows)
    rig.write_records(data, edited, "\r\n" if edit == "newlines" else "\n")
    os.utime(data, (1, 1))
    if edit not in EDITS:
        assert own_rig.goes_on(folder, data=data) is None
        return
    run = rig.finished(own_rig.words(folder, data=data), own_rig.output)
    assert run.code == 1, run.words
    assert "belongs to another run" in run.words and "data of default" in run.words
    assert rig.whole_steps(folder)[0] == 8, "nothing is lost by the refusal"


def test_another_base_is_refused_and_a_moved_one_is_not(own_rig, stopped, tmp_path):
    """F-22: one bit of a weight; and the same files elsewhere."""
    base = shutil.copytree(own_rig.place / "base", tmp_path / "moved")
    folder = shutil.copytree(stopped, tmp_path / "run")
    assert own_rig.goes_on(folder, model=base) is None
    shutil.rmtree(folder)
    shutil.copytree(stopped, folder)
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    run = rig.finished(own_rig.words(folder, model=base), own_rig.output)
    assert run.code == 1 and "base: the checkpoint has" in run.words

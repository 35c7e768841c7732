"""A run goes on from wherever it was stopped: in a step, or while base or tuned are scored."""

import json
import os
import signal
from pathlib import Path

import pytest

from lorica.cli import run as running
from lorica.records.write import RunRecorder


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))


def tensors(folder) -> bytes:
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


def rows(folder) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def words(stock, quick) -> list:
    data = ["--model", stock / "llama", "--data", stock / "pairs.jsonl"]
    return ["train", *data, *quick, "--output-dir", "run"]


def stop_in(monkeypatch, number, *, when):
    """Sends a signal to this process where predictions of base or tuned are about to be made."""
    real = running.predictions

    def predictions(model, adapter, *rest, **named):
        if (adapter is None) is (when == "base"):
            os.kill(os.getpid(), number)
        return real(model, adapter, *rest, **named)

    monkeypatch.setattr(running, "predictions", predictions)


def test_interrupted_in_a_step(lorica, words, finished_run, monkeypatch):
    real = RunRecorder.step

    def step(self, row):
        real(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "step", step)
        stopped = lorica(*words)
    assert stopped.code == 130
    assert "lorica train --resume run" in stopped.err
    assert manifest("run")["status"] == "interrupted"
    early = lorica("eval", "run", "--data", "x.jsonl")
    assert early.code == 2
    done = lorica("train", "--resume", "run")
    assert done.code == 0, done.err
    assert "going on from step 3" in done.out
    assert tensors("run") == tensors(finished_run), "not the bits of an uninterrupted run"
    assert [row["step"] for row in rows("run")] == [1, 2, 3, 4]
    ours, theirs = manifest("run")["scores"], manifest(finished_run)["scores"]
    assert ours == theirs
    config = Path("run/config.yaml").read_text(encoding="utf-8")
    assert "# --max-steps" in config and "# default" in config, "origins are kept"
    events = Path("run/events.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("targets: " in event for event in events) == 1


@pytest.mark.parametrize(
    ("when", "number"),
    [("base", signal.SIGINT), ("base", signal.SIGTERM), ("tuned", signal.SIGINT)],
)
def test_interrupted_while_scoring(lorica, words, finished_run, monkeypatch, when, number):
    with monkeypatch.context() as patch:
        stop_in(patch, number, when=when)
        stopped = lorica(*words)
    assert stopped.code == 128 + number
    assert "lorica train --resume run" in stopped.err
    assert manifest("run")["status"] == "interrupted"
    trained = [row["tokens_per_second"] for row in rows("run")] if when == "tuned" else []
    done = lorica("train", "--resume", "run", "--quiet")
    assert done.code == 0, done.err
    assert manifest("run")["status"] == "finished"
    assert tensors("run") == tensors(finished_run)
    assert manifest("run")["scores"] == manifest(finished_run)["scores"]
    if when == "tuned":
        assert [row["tokens_per_second"] for row in rows("run")] == trained, "no step twice"


def test_failure_while_scoring_can_be_gone_on_with(lorica, words, monkeypatch):
    def predictions(*_, **__):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(running, "predictions", predictions)
        failed = lorica(*words)
    assert failed.code == 1 and "memory ran out: no room" in failed.err
    assert "eval_batch_size" in failed.err and "Traceback" not in failed.err
    assert manifest("run")["status"] == "failed"
    assert "no room" in manifest("run")["error"]
    assert lorica("train", "--resume", "run", "--quiet").code == 0


def test_a_finished_run_is_left_alone(lorica, finished_run):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    done = lorica("train", "--resume", finished_run)
    assert done.code == 0 and "is finished (4 steps" in done.out
    assert "--max-steps" in done.out
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == before


def test_settings_that_a_finished_run_would_ignore(lorica, words, finished_run, stock):
    more = ["--max-steps", "99", "--lr", "0.5", "--r", "2"]
    done = lorica("train", "--resume", finished_run, *more)
    assert done.code == 2 and "would be ignored" in done.err
    assert "--max-steps: max_steps is 99, and the run had 4" in done.err
    assert "learning_rate is 0.5" in done.err
    assert " r is" not in done.err, "as it was"
    same = [finished_run if word == "run" else word for word in words]
    assert lorica(*same, "--resume", finished_run).code == 0, "the line that began it"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--replace"], "--replace would throw away"),
        (["--output-dir", "elsewhere"], "another folder than that of --resume"),
        (["--max-steps", "99"], "belongs to another run"),
    ],
)
def test_what_goes_with_no_resumed_run(lorica, finished_run, more, said, tmp_path):
    import shutil

    folder = shutil.copytree(finished_run, tmp_path / "copy")
    found = manifest(folder)
    (folder / "run.json").write_text(json.dumps({**found, "status": "interrupted"}))
    done = lorica("train", "--resume", folder, *more)
    assert done.code in (1, 2) and said in done.err


def test_nothing_to_resume(lorica):
    done = lorica("train", "--resume", "nowhere")
    assert done.code == 2 and "nowhere holds no run" in done.err

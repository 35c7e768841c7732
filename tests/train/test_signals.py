"""Signals to a real process: the state is saved, the exit code says which, the run goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorica.cli.run import stopped
from lorica.errors import Interrupted
from lorica.records.read import read_manifest
from lorica.train.signals import Stop, StopAsked, stopping
from train.runs import outcome, run

SCRIPT = Path(__file__).with_name("stoppable.py")


def start(folder, where, hash_seed):
    def listen():  # a shell's background job would ignore SIGINT, and so would its children
        signal.signal(signal.SIGINT, signal.default_int_handler)

    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), where],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
    )


def wait_until_ready(folder, process):
    for _ in range(1200):
        if Path(f"{folder}.ready").exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the process never came to the place where it is stopped")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Three processes side by side: folder, exit code and words of each."""
    root = tmp_path_factory.mktemp("signals")
    plan = {
        "whole": ("whole", "1", ()),
        "once": ("step", "2", (signal.SIGTERM,)),
        "twice": ("evaluation", "3", (signal.SIGINT, signal.SIGINT)),
    }
    running = {name: start(root / name, where, seed) for name, (where, seed, _) in plan.items()}
    for name, (_, _, numbers) in plan.items():
        for number in numbers:
            wait_until_ready(root / name, running[name])
            time.sleep(0.1)
            running[name].send_signal(number)
    found = {}
    for name, process in running.items():
        words = process.communicate(timeout=240)[1]
        found[name] = root / name, process.returncode, words
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run(folder, max_steps=5)
    return outcome(folder)


def test_another_process_gives_the_same_bytes(ended, reference):
    folder, code, words = ended["whole"]
    assert code == 0, words
    assert outcome(folder) == reference


def test_the_first_signal_saves_and_the_run_goes_on(ended, reference):
    folder, code, words = ended["once"]
    assert code == 143, words
    assert f"lorica.train(..., output_dir='{folder}', resume=True)" in words
    assert "the state was saved" in words
    assert read_manifest(folder / "run.json")["status"] == "interrupted"
    assert (folder / "checkpoints/step-00000003").is_dir()
    run(folder, max_steps=5, resume=True)
    assert outcome(folder) == reference


def test_the_second_signal_ends_at_once(ended, reference):
    folder, code, words = ended["twice"]
    assert code == 130, words
    assert "at once; the last checkpoint stands" in words
    assert read_manifest(folder / "run.json")["status"] == "interrupted"
    run(folder, max_steps=5, resume=True)
    assert outcome(folder) == reference


# in this process


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(StopAsked):
                stop.check()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def clock(monkeypatch):
    """The time that `Stop` sees, in a list."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_signal_of_another_process_is_not_the_first_of_this_one(clock):
    """torchrun ends a process once another one has ended: what it saves then must be whole."""
    stop = Stop(lambda number: max(number, signal.SIGTERM))
    with pytest.raises(StopAsked):
        stop.check()
    stop.handle(signal.SIGTERM, None)
    assert stop.asked == signal.SIGTERM
    clock[0] += 3
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)


def test_all_are_told_of_the_signal_to_one(clock):
    sent = []
    stop = Stop(lambda number: sent.append(number) or number)
    stop.check()
    stop.handle(signal.SIGHUP, None)
    with pytest.raises(StopAsked):
        stop.check()
    assert sent == [0, signal.SIGHUP]
    assert stop.error(Path("run"), saved=True).together
    assert not stop.error(Path("run"), saved=False).together
    alone = Stop()
    alone.handle(signal.SIGHUP, None)
    assert not alone.error(Path("run"), saved=True).together


def test_an_echo_is_not_a_second_signal(clock, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = Stop()
    stop.handle(signal.SIGTERM, None)
    clock[0] += 1.9
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGHUP, None)
    with pytest.raises(KeyboardInterrupt):  # a person at the keys
        stop.handle(signal.SIGINT, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    stop = Stop()
    stop.handle(signal.SIGINT, None)
    clock[0] += 0.4
    stop.handle(signal.SIGINT, None)
    clock[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_the_message_can_be_pasted(tmp_path, monkeypatch):
    """The command goes on only with what it began itself."""
    monkeypatch.chdir(tmp_path)
    with stopping() as stop:
        signal.raise_signal(signal.SIGHUP)
    folder = Path("runs/my run")
    told = str(stop.error(folder, saved=True))
    assert "lorica.train(..., output_dir='runs/my run', resume=True)" in told
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    error = stop.error(folder, saved=True)
    assert isinstance(error, Interrupted)
    assert error.exit_code == 129
    assert "lorica train --resume 'runs/my run'" in str(error)


def test_a_run_that_several_processes_make_goes_on_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    assert "start the same command again" in str(stopped(folder, signal.SIGTERM))
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\nshard_base: true   # --shard-base\n")
    (folder / "run.json").touch()
    told = str(stopped(folder, signal.SIGTERM))
    assert "none is lost" in told and "saved" not in told
    assert "go on with: torchrun ... -m lorica train --resume run" in told
    (folder / "checkpoints/step-00000002").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: m\nshard_base: false\n")
    told = str(stopped(folder, signal.SIGTERM))
    assert "the state was saved" in told and "go on with: lorica train --resume run" in told


def test_another_thread_trains_without_handlers(tmp_path):
    before, found = signal.getsignal(signal.SIGINT), []

    def work():
        found.append(run(tmp_path / "r", max_steps=4).steps)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [{"a": 4, "b": 4}]
    assert signal.getsignal(signal.SIGINT) is before

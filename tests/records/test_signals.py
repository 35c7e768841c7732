"""Signals wait while something is done that must not be left, and what a run says of its end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from faults import rig
from lorica.records.folder import RunFolder
from lorica.records.read import read_manifest
from lorica.records.signals import HEARD, signals_wait
from lorica.records.write import RunRecorder, write_end


class Stopped(BaseException):
    """What the handler raises."""


@contextmanager
def handled_by(handler) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in HEARD}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def raising(number, frame):
    raise Stopped(number)


@pytest.mark.parametrize("number", HEARD)
def test_they_reach_their_handler_when_the_work_is_done(number):
    done = []
    with handled_by(raising):
        with pytest.raises(Stopped), signals_wait():
            signal.raise_signal(number)
            done.append("work")
        assert signal.getsignal(number) is raising
    assert done == ["work"]


def test_those_that_are_ignored_stay_ignored():
    with handled_by(signal.SIG_IGN):
        with signals_wait():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_process_that_a_signal_ends_does_its_work_first(tmp_path):
    def work() -> None:
        with signals_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "done").touch()

    assert rig.fork(work, tmp_path / "words").wait() == -signal.SIGTERM
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("recorded", [True, False])
def test_how_a_run_ended_is_written_whatever_comes(tmp_path, monkeypatch, recorded):
    """A signal at each call of the system that writes run.json: the status is never the old one."""
    original, calls, at = os.write, [], 0

    def write(*words):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return original(*words)

    def ended(folder: RunFolder) -> None:
        outcome = {"status": "failed", "error": "out of luck"}
        if recorded:
            recorder.finish(outcome)
        else:
            write_end(folder, outcome)

    for at in (0, 1):
        with RunFolder.create(tmp_path / str(at)) as folder:
            recorder = RunRecorder(folder, config="")
            recorder.start({})
            assert read_manifest(folder.manifest)["status"] == "running"
            calls.clear()
            with monkeypatch.context() as patch, handled_by(raising):
                patch.setattr(os, "write", write)
                if at:
                    with pytest.raises(Stopped):
                        ended(folder)
                else:
                    ended(folder)
            assert calls
            found = read_manifest(folder.manifest)
            assert (found["status"], found["error"]) == ("failed", "out of luck")
            assert found["ended"]

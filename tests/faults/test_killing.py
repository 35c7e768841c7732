"""F-01: kill -9 at moments of a real run; what remains, and how the same command goes on.

The figures of many random kills come from benchmarks/reliability.py. Here the process dies at
chosen places, and a writer without care shows that the same look at the folder finds what is torn.
"""

import os
import shutil
import signal

import pytest

from faults import rig
from faults.scenarios import PHASES
from lorica.train import checkpoint


@pytest.mark.parametrize("phase", ["loading", "beginning", "step", "save", "prune", "publishing"])
def test_a_killed_run_goes_on_with_the_same_command(own_rig, phase):
    folder = own_rig.folder()
    trap = lambda: PHASES[phase](lambda: os.kill(os.getpid(), signal.SIGKILL))  # noqa: E731
    run = rig.finished(own_rig.words(folder), own_rig.output, before=trap)
    assert run.code == -signal.SIGKILL, run.words
    assert rig.names_of_steps(folder) == rig.whole_steps(folder)
    logged = rig.last_logged(folder)
    assert own_rig.goes_on(folder) is None
    told = [text for text in rig.events(folder) if text.startswith("going on from step")]
    if told:
        assert logged - int(told[-1].rpartition(" ")[2]) <= own_rig.changes["save_steps"]


def test_the_same_command_on_a_finished_run_says_so(own_rig):
    whole = own_rig.place / "whole"
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert rig.finished(own_rig.words(whole), own_rig.output).code == 0
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_a_run_is_not_begun_where_only_resume_names_the_folder(own_rig):
    """A wrong path after --resume must not train from the beginning."""
    words = own_rig.words(own_rig.folder(), output_dir=None)
    run = rig.finished(words, own_rig.output)
    assert run.code == 2
    assert "holds no run" in run.words


@pytest.mark.parametrize("content", [b"", b'{"pid": 1, "boot_id": "x"}\n"}\n'])
def test_killed_before_or_in_the_first_word_of_the_lock(own_rig, content):
    folder = own_rig.folder()
    folder.mkdir()
    (folder / ".lock").write_bytes(content)
    assert own_rig.goes_on(folder) is None


def test_a_writer_without_care_is_caught(own_rig):
    """The positive control: dying between two files leaves a folder that is not whole."""
    folder = own_rig.folder()

    def trap():
        real = checkpoint._files

        def save(place, state, *, keep=2):
            target = place / f"step-{state.step:08d}"
            for name, content in real(state).items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(content)
                if state.step == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
            return target

        checkpoint.save = save

    run = rig.finished(own_rig.words(folder), own_rig.output, before=trap)
    assert run.code == -signal.SIGKILL
    assert rig.names_of_steps(folder) == [6, 3]
    with pytest.raises(FileNotFoundError):
        rig.whole_steps(folder)
    shutil.rmtree(folder)

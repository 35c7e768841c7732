"""The run folder: what it accepts, and that one process holds it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lorica.errors import ConfigError, RunLocked
from lorica.records.folder import RunFolder, finite, json_line, lock_is_held

HOLDER = textwrap.dedent("""
    import sys, time
    from lorica.records.folder import RunFolder
    folder = RunFolder.create(sys.argv[1])
    print("held", flush=True)
    time.sleep(60)
""")


def holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, env=_environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_create_makes_parents_and_locks(tmp_path):
    path = tmp_path / "a b" / "ü" / "run"
    with RunFolder.create(path) as folder:
        assert folder.path == path
        assert lock_is_held(path)
        owner = json.loads((path / ".lock").read_bytes())
        assert owner["pid"] == os.getpid()
        assert set(owner) == {"pid", "host", "boot_id", "started"}
    assert not lock_is_held(path)


def test_second_process_is_refused_and_told_who(tmp_path):
    process = holder(tmp_path / "run")
    try:
        began = time.monotonic()
        with pytest.raises(RunLocked) as caught:
            RunFolder.create(tmp_path / "run")
        assert time.monotonic() - began < 1
        assert f"process {process.pid} on " in str(caught.value)
        assert "another --output-dir" in str(caught.value)
    finally:
        process.kill()
        process.communicate()


def test_lock_dies_with_a_killed_process(tmp_path):
    process = holder(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with RunFolder.create(tmp_path / "run") as folder:  # its manifest was never written
        assert folder.path.is_dir()


def test_same_process_is_refused_too(tmp_path):
    with RunFolder.create(tmp_path), pytest.raises(RunLocked, match="this process"):
        RunFolder.create(tmp_path)


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "adapter", "run.json"])
def test_foreign_folder_is_refused_and_untouched(tmp_path, name):
    """Also where the names could be ours: without our lock or manifest they are somebody's
    files.
    """
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=name):
        RunFolder.create(tmp_path, replace=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_existing_run_is_kept_unless_replaced(make_run):
    path = make_run()
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder.create(path)
    assert (path / "metrics.jsonl").read_bytes() == before

    (path / "notes.txt").write_text("mine")
    (path / "checkpoints").mkdir()
    with RunFolder.create(path, replace=True):
        assert sorted(entry.name for entry in path.iterdir()) == [".lock", "notes.txt"]


def test_check_says_the_same_and_writes_nothing(tmp_path, make_run):
    RunFolder.check(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    run = make_run()
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder.check(run)
    RunFolder.check(run, replace=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder.check(tmp_path / "other", replace=True)


def test_open_needs_a_run_and_clears_temporary_files(tmp_path, make_run):
    with pytest.raises(ConfigError, match="no run to go on with"):
        RunFolder.open(tmp_path / "nothing")
    path = make_run()
    (path / ".tmp-ckpt-5-x").mkdir()
    (path / ".tmp-ckpt-5-x" / "half").write_text("")
    (path / ".tmp-run.json").write_text("")
    with RunFolder.open(path):
        assert not [entry for entry in path.iterdir() if entry.name.startswith(".tmp-")]


def test_file_in_the_way_is_an_error_with_a_mend(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot write in") as caught:
        RunFolder.create(tmp_path / "run")
    assert "another --output-dir" in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a" * 65, "a\n"])
def test_adapter_names_cannot_leave_the_folder(tmp_path, name):
    with RunFolder.create(tmp_path / "run") as folder, pytest.raises(ConfigError, match="name a"):
        folder.adapter(name)


def test_adapter_places(tmp_path):
    with RunFolder.create(tmp_path) as folder:
        assert folder.adapter() == tmp_path / "adapter"
        assert folder.adapter("sql-2.b") == tmp_path / "adapters" / "sql-2.b"


def test_json_is_strict_whatever_comes():
    row = {
        "loss": float("nan"),
        "norm": float("inf"),
        "path": Path("a"),
        "text": "\ud800 ü",
        1: (2,),
    }
    line = json_line(row)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {
        "loss": None,
        "norm": None,
        "path": "a",
        "text": "\ud800 ü",
        "1": [2],
    }
    assert "ü".encode() in line  # readable, not escaped


def test_scalars_of_numpy_become_numbers():
    numpy = pytest.importorskip("numpy")
    assert finite({"a": numpy.float32(0.5), "b": numpy.int64(3), "c": numpy.float64("nan")}) == {
        "a": 0.5,
        "b": 3,
        "c": None,
    }

"""F-17, F-21, F-24 to F-29: other processes, clocks, limits, paths, files that change."""

import json
import locale
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

import lorica
from faults import operations, rig
from faults.scenarios import pauses, replaced_base, starters
from lorica.base.load import load_model
from lorica.errors import BaseModelError
from lorica.records.folder import RunFolder
from lorica.train.checkpoint import save

# --- F-17 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [(1,), (2,), (1, 2)])
def test_readers_that_have_gone(own_rig, streams):
    """Standard output, error, or both lead to a pipe that nobody reads."""
    folder = own_rig.folder()

    def trap():
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        ear, mouth = os.pipe()
        os.close(ear)
        for number in streams:
            os.dup2(mouth, number)

    words = [word for word in own_rig.words(folder) if word != "--quiet"]
    run = rig.finished(words, own_rig.output, before=trap)
    assert run.code == 0, run.words
    assert rig.digest(folder) == own_rig.wanted


# --- F-21 -----------------------------------------------------------------------------------------


def test_one_of_four_starters_wins(tmp_path):
    found = starters(tmp_path, 3)
    assert not found.violations, found.violations


@pytest.mark.parametrize("begun", [True, False])
def test_the_second_process_is_told_at_once(own_rig, begun):
    """In under a second, before it loads anything, with the number of the other."""
    folder = own_rig.folder()
    if begun:
        shutil.copytree(own_rig.place / "whole", folder)
        manifest = json.loads((folder / "run.json").read_text()) | {"status": "running"}
        (folder / "run.json").write_text(json.dumps(manifest))
    with RunFolder.open(folder) if begun else RunFolder.create(folder):
        began = time.monotonic()
        run = rig.finished(own_rig.words(folder), own_rig.output)
        assert time.monotonic() - began < 1
    assert run.code == 1
    assert f"is in use by process {os.getpid()}" in run.words


# --- F-24, F-25 -----------------------------------------------------------------------------------


def test_file_times_decide_nothing(tmp_path):
    for step in range(1, 11):
        save(tmp_path, operations.state(step), keep=10)
        for age, path in enumerate(sorted(tmp_path.glob("step-*"), reverse=True)):
            os.utime(path, (10**9 + age, 10**9 + age))
    save(tmp_path, operations.state(11), keep=3)
    assert operations.names(tmp_path) == [f"step-{n:08d}" for n in (9, 10, 11)]


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps(own_rig, years):
    folder = own_rig.folder()

    def trap():
        real, calls = time.time, [0]

        def jumping():
            calls[0] += 1
            return real() + years * 31_557_600 * (calls[0] % 2)

        time.time = jumping

    run = rig.finished(own_rig.words(folder), own_rig.output, before=trap)
    assert run.code == 0, run.words
    assert rig.digest(folder) == own_rig.wanted
    for line in (folder / "events.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["seconds"] < 100
    assert 0 < json.loads((folder / "run.json").read_text())["resources"]["seconds"] < 100


def test_a_laptop_that_sleeps(own_rig):
    found = pauses(own_rig, 5)
    assert not found.violations, found.violations


# --- F-26 -----------------------------------------------------------------------------------------


def few_files():
    limit = len(os.listdir("/proc/self/fd")) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def plain_locale():
    os.environ["LC_ALL"] = "C"
    locale.setlocale(locale.LC_ALL, "C")


def other_zone():
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()


SURROUNDINGS = {
    "few open files, spaces": (few_files, "a run with  spaces"),
    "umask 077, quotes": (lambda: os.umask(0o077), "it's $(touch x) `y`"),
    "plain locale": (plain_locale, "Läufe"),
    "time zone, unicode": (other_zone, "прогон-実行-🦎"),
    "no home, dashes": (lambda: os.environ.pop("HOME", None), "-rf"),
    "255 bytes": (None, "å" * 127 + "x"),
    "deep": (None, "a/b/c/d"),
    "link": (None, "link"),
}
"""Case -> what is strange about the process, and the folder; each is strange by itself."""


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_surroundings(own_rig, tmp_path, case):
    before, name = SURROUNDINGS[case]
    if case == "link":
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = tmp_path / name
    run = rig.finished(own_rig.words(folder), own_rig.output, before=before)
    assert run.code == 0, run.words
    assert rig.digest(folder) == own_rig.wanted
    modes = {p.stat().st_mode & 0o777 for p in (folder / "adapter").glob("adapter_*")}
    assert modes == {0o644}
    assert {p.name for p in tmp_path.iterdir()} <= {name.split("/")[0], "real"}


@pytest.mark.parametrize("name", ["å" * 127, "x" * 255, "実" * 85])
def test_adapters_with_the_longest_names(tmp_path, name, monkeypatch):
    folder = tmp_path / name
    for seed in (1, 2):
        monkeypatch.setattr(operations, "ADAPTER", name)
        operations._publish(tmp_path, seed)
    assert folder.is_dir() and operations.names(tmp_path) == [name]


# --- F-27, F-28, F-29 -----------------------------------------------------------------------------


@pytest.mark.parametrize("lack", ["shard", "half a shard", "weights", "config", "tokenizer"])
def test_a_base_that_was_not_downloaded_whole(own_rig, tmp_path, lack):
    base = shutil.copytree(own_rig.place / "base", tmp_path / "base")
    if "shard" in lack:
        from safetensors.torch import load_file

        tensors = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"a": names[:9], "b": names[9:]}
        where = {}
        for key, own in parts.items():
            file = f"model-{key}.safetensors"
            save_file({n: tensors[n] for n in own}, base / file, metadata={"format": "pt"})
            where |= dict.fromkeys(own, file)
        index = {"metadata": {}, "weight_map": where}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        load_model(base)  # whole it loads
        second = base / "model-b.safetensors"
        second.unlink() if lack == "shard" else os.truncate(second, second.stat().st_size // 2)
    elif lack == "weights":
        (base / "model.safetensors").unlink()
    elif lack == "config":
        (base / "config.json").unlink()
    else:
        for file in base.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(BaseModelError):
        load_model(base)


def test_there_are_no_loader_processes():
    """F-28: records are lists in memory, so no worker can die or hang."""
    words = re.compile(r"\b(DataLoader|multiprocessing|ProcessPool|os\.fork)\b")
    package = Path(lorica.__file__).parent
    found = [p.name for p in package.rglob("*.py") if words.search(p.read_text())]
    assert found == []


def test_a_base_that_is_overwritten_while_it_trains(own_rig):
    """F-29: neither a dead process (SIGBUS) nor another result."""
    found = replaced_base(own_rig, 1)
    assert not found.violations, found.violations

"""Checkpoints under every fault: what is read is an old one or the new one, whole, or an error."""

import errno
import json
import os
import shutil

import pytest
import torch

from lorica.errors import CheckpointError
from lorica.records import atomic
from lorica.train import checkpoint
from lorica.train.checkpoint import State, load, save

IDENTITY = {"base": "abc", "settings.seed": "0"}
FILES = [
    "adapters/a.safetensors",
    "adapters/b.safetensors",
    "best/a.safetensors",
    "optimizers/a.safetensors",
    "state.json",
    "MANIFEST.json",
]


def state(step, **changes):
    generator = torch.Generator().manual_seed(step)

    def tensors(*shape):
        return {"A": torch.randn(*shape, generator=generator), "B": torch.zeros(3, 1)}

    made = State(
        step,
        IDENTITY,
        {"threads": "1"},
        counters={"a": {"step": step, "best_loss": 0.1 + step / 3}, "b": {"step": step}},
        adapters={"a": tensors(5, 7), "b": tensors(2, 3).copy()},
        optimizers={"a": tensors(1, 3)},
        best={"a": tensors(5, 7)},
    )
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def assert_is(found, step):
    wanted = state(step)
    assert found.step == step
    assert (found.counters, found.identity) == (wanted.counters, wanted.identity)
    for group in ("adapters", "optimizers", "best"):
        there, here = getattr(found, group), getattr(wanted, group)
        assert there.keys() == here.keys()
        for name, tensors in here.items():
            assert there[name].keys() == tensors.keys()
            assert all(torch.equal(there[name][key], t) for key, t in tensors.items())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_reads_back_as_it_was(tmp_path):
    save(tmp_path / "c", state(7, unjudged=True, seconds=1.25))
    found, notes = load(tmp_path / "c", IDENTITY, circumstances={"threads": "1"})
    assert_is(found, 7)
    assert (found.unjudged, found.seconds, notes) == (True, 1.25, [])


def test_nothing_there(tmp_path):
    assert load(tmp_path / "none", IDENTITY) == (None, [])
    checkpoint.clean(tmp_path / "none")
    (tmp_path / "step-x").mkdir()
    assert load(tmp_path, IDENTITY) == (None, [])


def test_the_highest_step_counts_and_not_the_time(tmp_path):
    for step in (5, 9, 100_000_000):
        save(tmp_path, state(step), keep=9)
    for age, path in enumerate(sorted(tmp_path.glob("step-*"))):
        os.utime(path, (age, 10**9 - age * 10**8))
    assert_is(load(tmp_path, IDENTITY)[0], 100_000_000)


@pytest.mark.parametrize(("keep", "left"), [(1, 2), (2, 2), (3, 3)])
def test_older_ones_go_but_two_stay(tmp_path, keep, left):
    for step in range(1, 6):
        save(tmp_path, state(step), keep=keep)
    assert names(tmp_path) == [f"step-{s:08d}" for s in range(6 - left, 6)]


def test_modes_let_others_read(tmp_path):
    path = save(tmp_path, state(1))
    assert {oct(f.stat().st_mode & 0o777) for f in path.rglob("*") if f.is_file()} == {"0o644"}


DAMAGES = {
    "delete": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "shorter": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b" "),
    "bit": lambda path, other: flip(path),
    "swapped": lambda path, other: shutil.copy(other, path),
}


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-len(raw) // 3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_seen_and_the_older_one_used(tmp_path, file, damage):
    save(tmp_path, state(3))
    save(tmp_path, state(4))
    DAMAGES[damage](tmp_path / "step-00000004" / file, tmp_path / "step-00000003" / file)
    found, notes = load(tmp_path, IDENTITY)
    if damage == "longer" and file == "MANIFEST.json":  # a blank behind the JSON says nothing
        assert_is(found, 4)
        return
    assert_is(found, 3)
    assert len(notes) == 1
    assert notes[0].startswith("step-00000004 is damaged (")
    assert [n[:18] for n in names(tmp_path)] == [".bad-step-00000004", "step-00000003"]
    save(tmp_path, state(4))  # the run comes by again
    assert_is(load(tmp_path, IDENTITY)[0], 4)


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path):
    path = save(tmp_path, state(2))
    shutil.copy(path / FILES[0], path / "adapters/c.safetensors")
    assert_is(load(tmp_path, IDENTITY)[0], 2)


def test_all_damaged_is_an_error_with_a_list(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, state(step)) / "adapters/a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, IDENTITY)
    assert len(caught.value.problems) == 2
    with pytest.raises(CheckpointError, match="set aside earlier"):
        load(tmp_path, IDENTITY)


def test_another_schema_is_refused_and_left_alone(tmp_path):
    path = save(tmp_path, state(2))
    manifest = json.loads((path / "MANIFEST.json").read_bytes()) | {"schema": 2}
    manifest["sha256"] = checkpoint._own_digest(manifest)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has the schema 2"):
        load(tmp_path, IDENTITY)
    assert names(tmp_path) == ["step-00000002"]


def test_a_renamed_checkpoint_is_not_believed(tmp_path):
    save(tmp_path, state(3))
    save(tmp_path, state(4)).rename(tmp_path / "step-00000009")
    assert_is(load(tmp_path, IDENTITY)[0], 3)


def test_every_difference_of_identity_is_named(tmp_path):
    save(tmp_path, state(2))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {"base": "x" * 70, "more": "1"})
    assert caught.value.problems == (
        f"base: the checkpoint has abc, this run {'x' * 57}...",
        "more: the checkpoint has nothing, this run 1",
        "settings.seed: the checkpoint has 0, this run nothing",
    )
    assert names(tmp_path) == ["step-00000002"]


def test_other_circumstances_are_told(tmp_path):
    save(tmp_path, state(2))
    notes = load(tmp_path, IDENTITY, circumstances={"threads": "2"})[1]
    assert notes == [
        "going on with another threads (1 before, 2 now): the result will not be the same to the "
        "bit"
    ]


def test_the_same_step_again_keeps_the_whole_one_and_replaces_a_torn_one(tmp_path):
    path = save(tmp_path, state(2))
    before = (path / "MANIFEST.json").stat().st_ino
    assert (save(tmp_path, state(2)) / "MANIFEST.json").stat().st_ino == before
    flip(path / "state.json")
    save(tmp_path, state(2))
    assert_is(load(tmp_path, IDENTITY)[0], 2)


# --- faults while saving --------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir")


class Faults:
    """Counts the system calls that saving makes, and lets one of them, or all later, fail."""

    def __init__(self, patch, fail):
        self.count, self.fail = 0, fail
        for name in CALLS:
            patch.setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name, original):
        def call(*arguments, **named):
            self.count += 1
            self.fail(self.count)
            return original(*arguments, **named)

        return call


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "c"
    for step in (1, 2):
        save(folder, state(step))
    return folder


def number_of_calls(tmp_path, two_saved, monkeypatch):
    folder = shutil.copytree(two_saved, tmp_path / "count")
    with monkeypatch.context() as patch:
        faults = Faults(patch, lambda count: None)
        save(folder, state(3))
    assert faults.count > 25, "saving no longer goes through the calls that are watched"
    return faults.count


@pytest.mark.parametrize(("error", "forever"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_a_disk_that_fails(tmp_path, two_saved, monkeypatch, error, forever):
    """At every call: an error that names the step, or success; and only whole checkpoints."""
    for at in range(1, number_of_calls(tmp_path, two_saved, monkeypatch) + 1):
        folder = shutil.copytree(two_saved, tmp_path / str(at))

        def fail(count, at=at):
            if count == at or (forever and count > at):
                raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            Faults(patch, fail)
            try:
                save(folder, state(3))
            except CheckpointError as caught:
                assert "step 3 could not be written" in str(caught)
                assert "bytes are free" in str(caught)
                assert "untouched" in str(caught)
        found, notes = load(folder, IDENTITY)
        assert not notes
        assert_is(found, found.step)
        assert found.step in (2, 3)
        checkpoint.clean(folder)
        assert all(name.startswith("step-") for name in names(folder))
        save(folder, state(3))  # with space again it goes on
        assert_is(load(folder, IDENTITY)[0], 3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_dies(tmp_path, two_saved, monkeypatch):
    """kill -9 at every call: the newest checkpoint is the old one or the new one, never a mix."""
    seen = set()
    for at in range(1, number_of_calls(tmp_path, two_saved, monkeypatch) + 1):
        folder = shutil.copytree(two_saved, tmp_path / str(at))
        child = os.fork()
        if child == 0:
            with monkeypatch.context() as patch:
                Faults(patch, lambda count, at=at: os._exit(9) if count == at else None)
                save(folder, state(3))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found, notes = load(folder, IDENTITY)
        assert not notes
        assert_is(found, found.step)
        seen.add(found.step)
        checkpoint.clean(folder)
        assert all(name.startswith("step-") for name in names(folder))
    assert seen == {2, 3}


def test_everything_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Every file is fsynced before its rename, the manifest last, and the folder after its own."""
    log, original = [], {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(descriptor):
        log.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        original["fsync"](descriptor)

    def moved(name):
        def call(source, target):
            log.append((name, str(source), str(target)))
            original[name](source, target)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", moved("replace"))
    monkeypatch.setattr(os, "rename", moved("rename"))
    save(tmp_path / "c", state(1))
    files = [entry for entry in log if entry[0] == "replace"]
    assert [f[2].rpartition("/")[2] for f in files][-2:] == ["state.json", "MANIFEST.json"]
    for _, source, target in files:
        at = log.index(("replace", source, target))
        assert ("fsync", source) in log[:at]
        assert ("fsync", target.rpartition("/")[0]) in log[at:]
    publish = next(i for i, entry in enumerate(log) if entry[0] == "rename")
    assert all(log.index(entry) < publish for entry in files)
    assert ("fsync", str(tmp_path / "c")) in log[publish:]
    assert ("fsync", str(tmp_path)) in log[:publish]
    assert atomic.os is os

"""F-05 to F-09: disks that are full, read-only or that changed what was written."""

import errno
import json
import os
import tempfile
import time
from pathlib import Path

import pytest

from faults import operations, rig
from faults.scenarios import damage, full_disk, short_files
from lorica.cli import prepare as preparing
from lorica.config import TrainSettings
from lorica.errors import CheckpointError
from lorica.train import checkpoint
from lorica.train.checkpoint import load, save, space_warning


def can_mount(place: Path) -> bool:
    return os.geteuid() == 0 and os.system(f"mount -t tmpfs x {place} 2>/dev/null") == 0


def test_a_full_disk(own_rig, tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this user may not mount a small disk")
    os.system(f"umount {tmp_path}")
    found = full_disk(own_rig, [0, 230_000])
    assert not found.violations, found.violations
    assert found.figures["runs that failed for lack of space"] == 2


def test_files_that_cannot_grow(own_rig):
    found = short_files(own_rig, [30_000])
    assert not found.violations, found.violations


def test_the_message_has_numbers(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "c", operations.state(3))
    told = str(caught.value)
    assert "No space left" in told and str(tmp_path) in told and "bytes are free" in told
    assert int(told.partition("expected: ")[2].split()[0].replace(",", "")) > 500


def test_too_little_space_is_told_before_it_is_needed(tmp_path, monkeypatch):
    tensors = operations.state(1).adapters["a"].values()
    settings = TrainSettings(max_steps=1)
    assert space_warning(tmp_path, tensors, settings) is None
    few = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: few)
    told = space_warning(tmp_path, tensors, settings)
    assert told is not None and "100 bytes are free" in told and "1,120" in told


def test_rows_that_cannot_be_written_do_not_stop_it(own_rig):
    """F-06: every write of metrics and events fails: one warning each, the same adapter."""
    folder = own_rig.folder()

    def trap():
        real = os.write

        def write(descriptor, data):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if name.endswith(("metrics.jsonl", "events.jsonl")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data)

        os.write = write

    run = rig.finished(own_rig.words(folder), own_rig.output, before=trap)
    assert run.code == 0, run.words
    assert rig.digest(folder) == own_rig.wanted
    assert run.words.count("cannot be written") == 2


def test_a_folder_that_may_not_be_written_in(own_rig):
    """F-07: told in under two seconds, before anything is loaded."""
    if os.geteuid() != 0:
        pytest.skip("becomes another user, which only root may")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)

        def trap():
            os.setuid(65534)  # root may write anywhere
            preparing.gather = preparing.load_model = None  # not even called

        began = time.monotonic()
        words = own_rig.words(Path(name) / "run")
        run = rig.finished(words, own_rig.output, before=trap)
        assert run.code == 2, run.words
        assert "cannot write in" in run.words and "Permission denied" in run.words
        assert time.monotonic() - began < 2


def test_a_disk_that_is_read_only(own_rig, tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this user may not mount a disk")
    try:
        os.system(f"mount -o remount,ro {tmp_path}")
        run = rig.finished(own_rig.words(tmp_path / "run"), own_rig.output)
        assert run.code == 2 and "Read-only file system" in run.words, run.words
    finally:
        os.system(f"umount {tmp_path}")


def test_every_damage_to_every_file(tmp_path):
    """F-08."""
    found = damage(
        tmp_path,
        lambda folder, step: save(folder, operations.state(step), keep=3),
        lambda folder: load(folder, operations.IDENTITY),
    )
    assert found.cases == 105
    assert not found.violations, found.violations


def test_what_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch):
    """A process out of files, or a disk with an error, sets nothing aside and loses nothing."""
    for step in (1, 2):
        save(tmp_path / "c", operations.state(step))
    real = Path.read_bytes

    def read(self):
        if "step-00000002" in str(self) or everything:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    everything = False
    state, notes = load(tmp_path / "c", operations.IDENTITY)
    assert state is not None and state.step == 1
    assert notes == ["step-00000002 cannot be read (Too many open files); it was passed over"]
    everything = True
    with pytest.raises(CheckpointError, match="can be read") as caught:
        load(tmp_path / "c", operations.IDENTITY)
    assert len(caught.value.problems) == 2
    monkeypatch.undo()
    state, notes = load(tmp_path / "c", operations.IDENTITY)
    assert state is not None and (state.step, notes) == (2, [])


@pytest.mark.parametrize("schema", [0, 2, "1"])
def test_other_schemas_are_refused(tmp_path, schema):
    """F-09."""
    path = save(tmp_path, operations.state(2))
    manifest = json.loads((path / "MANIFEST.json").read_bytes()) | {"schema": schema}
    manifest["sha256"] = checkpoint._own_digest(manifest)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="resume with the version that began the run"):
        load(tmp_path, operations.IDENTITY)
    assert operations.names(tmp_path) == ["step-00000002"]

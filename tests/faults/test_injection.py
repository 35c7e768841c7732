"""F-02, F-04, F-30: every call that changes the disk fails or is the last one."""

import pytest

from faults import operations
from faults.injection import Operation, count_calls, crash_again_and_again, sweep
from lorica.files import folder as publishing
from lorica.train.checkpoint import _files


@pytest.mark.parametrize(
    ("operation", "modes"),
    [
        (operations.SAVE, ("kill", "ENOSPC forever")),
        (operations.RECOVER, ("kill", "EIO once", "EIO forever", "ENOSPC forever")),
        (operations.BEGIN, ("kill", "ENOSPC once", "EIO forever")),
        (operations.FIRST_PUBLISH, ("ENOSPC forever",)),
        (operations.PUBLISH, ("EIO once",)),
        (operations.MERGE, ("kill",)),
    ],
    ids=lambda value: value.name if isinstance(value, Operation) else "",
)
def test_every_call(operation, modes, tmp_path):
    found = sweep(operation, tmp_path, modes=modes)
    assert found.cases == found.calls * len(modes)
    assert not found.violations, "\n".join(found.violations[:5])


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda found: found.name)
def test_every_call_and_every_fault(operation, tmp_path):
    assert not sweep(operation, tmp_path).violations


@pytest.mark.slow
def test_the_same_crash_five_times(tmp_path):
    assert not crash_again_and_again(operations.STACKED, tmp_path).violations


def test_the_calls_are_seen(tmp_path):
    """Else nothing above would prove anything."""
    operations.SAVE.prepare(tmp_path)
    assert count_calls(lambda: operations.SAVE.work(tmp_path)) > 50


def _naive(folder):
    for name, content in _files(operations.state(3)).items():
        target = folder / "step-00000003" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def test_a_writer_without_care_is_caught(tmp_path):
    """The positive control: straight into the folder, no manifest, nothing synced."""
    naive = Operation("naive", operations.SAVE.prepare, _naive, operations._saved_or_not)
    found = sweep(naive, tmp_path, modes=("kill",))
    assert len(found.violations) > found.cases / 2


def test_an_exchange_that_the_system_lacks(tmp_path, monkeypatch):
    """Then an old adapter is moved aside first; that is told in the docstring of `new_folder`."""
    monkeypatch.setattr(publishing, "exchange", lambda new, old: False)
    operations.PUBLISH.prepare(tmp_path)
    operations.PUBLISH.work(tmp_path)
    assert operations._publication(tmp_path, True) is None
    assert operations.names(tmp_path) == ["adapter", "other"]

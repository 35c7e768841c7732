"""F-03: the power goes after any call, and what was not synced is gone in any combination."""

import pytest

from faults import operations, powerloss


@pytest.fixture(params=operations.LOSSES, ids=lambda pair: pair[0].name)
def recorded(request, tmp_path):
    operation, judge = request.param
    root = tmp_path / "root"
    root.mkdir()
    operation.prepare(root)
    with powerloss.logged(root) as log:
        operation.work(root)
    return log, judge, tmp_path


def test_the_old_or_the_new_and_what_was_said_to_be_there(recorded):
    log, judge, place = recorded
    number, found = powerloss.violations(log, place, judge)
    assert number > 100
    assert not found, "\n".join(found[:5])


def test_the_log_rebuilds_what_is_on_the_disk(recorded):
    """Else the states would be those of another operation."""
    log, _, place = recorded
    *_, (_, lost, tree) = ((e, w, t) for e, w, t in log.states() if w == "nothing")
    assert lost == "nothing"
    assert powerloss._print(tree) == powerloss._print(powerloss._read(place / "root"))


def test_without_one_fsync_it_fails(tmp_path):
    """The positive control: at the first fsync of a file, and at the last of the folder."""
    operation, judge = operations.LOSSES[0]
    root = tmp_path / "root"
    root.mkdir()
    operation.prepare(root)
    with powerloss.logged(root) as log:
        operation.work(root)
    for number in (0, log.num_syncs() - 1):
        _, found = powerloss.violations(log, tmp_path, judge, without_sync=number, first_only=True)
        assert found, f"fsync {number} could be left out"

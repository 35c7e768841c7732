"""F-16: SIGINT, SIGTERM and SIGHUP in every phase of a run."""

import pytest

from faults.scenarios import PHASES, interrupts_by_phase


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_every_phase(own_rig, phase):
    number = (2, 15, 1)[list(PHASES).index(phase) % 3]
    found = interrupts_by_phase(own_rig, [phase], [number])
    assert not found.violations, found.violations


@pytest.mark.parametrize("phase", ["step", "save"])
def test_two_signals_at_once(own_rig, phase):
    found = interrupts_by_phase(own_rig, [phase], [15], times=2)
    assert not found.violations, found.violations

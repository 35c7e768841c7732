"""What a run says of its own memory."""

import subprocess
import sys

import pytest

from lorica.train.measure import _high_water_mark, memory_bytes

MIB = 1 << 20


@pytest.mark.skipif(_high_water_mark() is None, reason="the kernel does not tell it (no VmHWM)")
def test_peak_memory_is_not_that_of_the_program_that_started_us():
    """A notebook of some gigabytes may start `lorica train`; the run's own peak is less."""
    child = "from lorica.train.measure import memory_bytes; print(memory_bytes())"
    parent = (
        "import subprocess, sys; big = bytearray(b'x') * (1500 << 20); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    ended = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert 50 * MIB < int(ended.stdout) < 1400 * MIB


def test_peak_memory_knows_what_was_freed_again():
    before = memory_bytes()
    block = bytearray(b"x") * before  # as much again
    del block
    assert memory_bytes() > before + before // 2

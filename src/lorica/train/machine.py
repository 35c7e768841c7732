"""Memory that this process holds, and that the machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from lorica.train.measure import memory_bytes


def process_bytes() -> int:
    """Resident memory of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine_bytes(device: torch.device) -> tuple[int, int]:
    """Memory that this machine has, and of it what is free: of the GPU where one is used; a limit
    that a container sets counts.
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole, free
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole, whole
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    whole, free = (1024 * int(fields.get(key, 0)) for key in ("MemTotal", "MemAvailable"))
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < whole:
        whole, free = limit, min(free, max(0, limit - (used or 0)))
    return whole, free


def _cgroup(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None

"""What a process holds for storages that come and go: asked of the C library's allocator itself.

glibc maps large requests by themselves, but every freed mapping raises the size from which on it
does so, up to 32 MiB. From then on tensors come from a heap that gives back only its top, and holes
between them are found again only where the next request fits: small objects settle in them. How
much more than the tensors a process then holds is nothing to guess at. A process of its own makes
the same requests of the same allocator, in the same order, and asks it what it took from the
system; as nothing is written into the memory, none is used.

    python heap.py < events.json      # [[number, bytes], ...]; minus: it goes; prints the most held
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

ALIGNMENT = 64
"""Bytes to which torch aligns its tensors on a CPU."""
OBJECTS = (96, 192, 288, 16, 32, 48, 64, 80)
"""Bytes of what comes with a tensor, behind its data: its storage, its handle, its node in the
graph; vectors of shapes and strides, counters and saved variables of five small sizes. Their number
and order are assumed, not measured (docs/plan.md)."""
ASKED_FROM = 64 * 1024
"""Bytes of a tensor after which the allocator is asked; smaller ones change little."""
_PATIENCE = 60.0


def held(events: Sequence[tuple[int, int]]) -> int | None:
    """Most bytes that a process holds beyond what it held before; None where that cannot be asked.

    Args:
        events: number of a storage, and its bytes where it comes, minus them where it goes.
    """
    call = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(
            call,
            input=json.dumps(list(events)).encode(),
            capture_output=True,
            timeout=_PATIENCE,
            start_new_session=True,  # Ctrl-C is for us
        )
        return int(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


_NAMES = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def _replay(events: Iterable[Sequence[int]]) -> int:
    """In this process. Raises AttributeError where the C library is not glibc of at least 2.33."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo2
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes, library.free.restype = [ctypes.c_void_p], None
    library.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def now() -> int:
        found: Any = library.mallinfo2()
        return found.arena + found.hblkhd

    before, peak, refused = now(), 0, 0
    there: dict[int, list[int | None]] = {}
    place = ctypes.c_void_p()
    for number, size in events:
        if size > 0:
            failed = library.posix_memalign(ctypes.byref(place), ALIGNMENT, size)
            refused += size if failed else 0  # more than the system would ever give
            own = None if failed else place.value
            there[number] = [own, *(library.malloc(o) for o in OBJECTS)]
            if size >= ASKED_FROM:
                peak = max(peak, now() - before + refused)
        elif number in there:
            refused += size if there[number][0] is None else 0
            for pointer in there.pop(number):
                library.free(pointer)
    return max(peak, now() - before + refused)


if __name__ == "__main__":
    print(_replay(json.load(sys.stdin)))

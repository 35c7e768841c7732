"""What a computation holds in memory, moment by moment, found out without doing it.

Under torch's fake tensors every operation of a model runs in shape alone: the same Python, the same
autograd graph, the same order, but no numbers and no memory. `Ledger` writes down every storage
that comes and goes meanwhile. Nothing is assumed about an architecture: what a layer saves for its
backward pass, what recomputation drops, when autograd lets a tensor go is read off the real graph.

The bytes that live at once are less than what the process holds: the allocator keeps freed memory
and cuts it into pieces. `replay` takes the ledger through a model of glibc's malloc, as its manual
and source describe it: requests at or above a threshold are mapped by themselves and handed back
when freed; others come from a heap, from the smallest free piece that fits, and go back to the
system only from its top. Freeing a mapped piece raises the threshold to its size, up to 32 MiB,
which is why a process that trains keeps more than it needs. Two things keep freed pieces from being
found again. A request for an aligned piece must find more than the piece, so that a hole left by
one of the same size is too small, unless it can be joined with what was cut off in front of it and
behind it. But these scraps of 32 to 96 bytes are just what small objects ask for, and many come
with every tensor (vectors of its shape, counters, its handle, its storage, its node in the graph):
they settle between the large pieces, and stay in a cache when freed. So a heap grows far beyond
what lives in it, the more so the more tensors of one size come and go.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Event:
    """A storage comes (`size` > 0 bytes) or goes (`size` < 0); `wide` where it holds logits."""

    number: int
    size: int
    wide: bool = False


class Ledger(TorchDispatchMode):
    """Writes down the storages that the operations inside the block make and let go.

    Args:
        vocabulary: tensors with a dimension of this size count as logits; 0: none.

    Attributes:
        events: in order.
        live: bytes that live now.
        peak: the most that lived at once.
        peak_at: number of events before the moment of `peak`.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.events: list[Event] = []
        self.live = self.peak = self.peak_at = 0
        self._known: dict[int, tuple[int, int]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.take(leaf)
        return made

    def take(self, tensor: Tensor) -> None:
        """Write down the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, self._count = storage.nbytes(), self._count + 1
        self._known[key] = self._count, size
        self.events.append(Event(self._count, size, self.vocabulary in tensor.shape[-1:]))
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, len(self.events)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        number, size = self._known.pop(key)
        self.events.append(Event(number, -size))
        self.live -= size

    def forget(self) -> None:
        """Begin anew: what lives now was there before, and is not counted again."""
        self.events, self.live, self.peak, self.peak_at = [], 0, 0, 0

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of a living tensor's storage."""
        found = self._known.get(tensor.untyped_storage()._cdata)
        return found[0] if found else None

    def alive(self, at: int) -> dict[int, Event]:
        """The storages that live after the first `at` events, by number."""
        found: dict[int, Event] = {}
        for event in self.events[:at]:
            if event.size > 0:
                found[event.number] = event
            else:
                found.pop(event.number, None)
        return found


def renumbered(stretches: Iterable[Sequence[Event]]) -> list[Event]:
    """Stretches of a ledger one after the other, as often as they are given: a storage that comes
    again is another one.
    """
    made: list[Event] = []
    last = 0
    for stretch in stretches:
        numbers: dict[int, int] = {}
        for event in stretch:
            if event.size > 0:
                last += 1
                numbers[event.number] = last
            if event.number in numbers:
                made.append(Event(numbers[event.number], event.size, event.wide))
    return made


PAGE = 4096
ALIGNMENT = 64
"""Bytes to which torch aligns its tensors on a CPU."""
SEARCHED = ALIGNMENT + 32
"""Bytes that glibc looks for beyond the piece, to place it aligned."""
HEADER, SMALLEST = 16, 32
OBJECTS = (32, 48, 64, 80, 96, 112, 208, 304)
"""Bytes of what comes with a tensor, its headers included: vectors of shapes and strides, counters
and saved variables of five small sizes, its storage, its handle, its node in the graph. Their
number is assumed, not measured."""
CACHED = 7
"""Freed objects of one size that glibc keeps as they are (tcache_count)."""
FIRST_THRESHOLD, LAST_THRESHOLD = 128 * 1024, 32 * 1024 * 1024
"""Bytes at and above which glibc maps a request by itself: at the start, and at the most."""


def replay(events: Iterable[Event]) -> int:
    """Most bytes that a process would hold for these events with glibc's malloc."""
    heap = _Heap()
    for event in events:
        if event.size > 0:
            heap.take(event.number, event.size)
        elif event.size < 0:
            heap.drop(event.number)
    return heap.peak


class _Heap:
    """A heap that grows at its top, and mapped pieces beside it. Pieces are [start, end)."""

    def __init__(self) -> None:
        self.threshold, self.top, self.mapped, self.peak = FIRST_THRESHOLD, 0, 0, 0
        self.extent = 0  # the heap as the system sees it; between top and extent it is free
        self.used: dict[Any, tuple[int, int]] = {}
        self.maps: dict[int, int] = {}
        self.free: list[tuple[int, int]] = []  # (size, start), sorted
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.cache: dict[int, list[tuple[int, int]]] = {size: [] for size in OBJECTS}

    def take(self, number: int, size: int) -> None:
        """Place a tensor with what comes with it."""
        for small in OBJECTS[:-1]:
            self._take_object(number, small)
        self._take_piece(number, (size + 15) // 16 * 16 + HEADER)
        self._take_object(number, OBJECTS[-1])
        self.peak = max(self.peak, self.extent + self.mapped)

    def drop(self, number: int) -> None:
        """Let a tensor go."""
        whole = self.maps.pop(number, None)
        if whole is not None:
            self.mapped -= whole
            if self.threshold < whole <= LAST_THRESHOLD:
                self.threshold = whole
        elif number in self.used:
            self._release(*self.used.pop(number))
        for small in OBJECTS:
            piece = self.used.pop((number, small), None)
            if piece is not None and len(self.cache[small]) < CACHED:
                self.cache[small].append(piece)
            elif piece is not None:
                self._release(*piece)

    def _take_piece(self, number: int, size: int) -> None:
        wanted = size + SEARCHED
        place = self._find(wanted)
        if place is None and self.extent - self.top < wanted and wanted >= self.threshold:
            whole = (wanted + PAGE - 1) // PAGE * PAGE
            self.maps[number] = whole
            self.mapped += whole
            return
        start, end = place or self._grow(wanted)
        first = _aligned(start)
        if first > start:
            self._release(start, first)
        rest = end - first - size
        self.used[number] = first, first + size if rest >= SMALLEST else end
        if rest >= SMALLEST:
            self._release(first + size, end)

    def _take_object(self, number: int, size: int) -> None:
        if self.cache[size]:
            self.used[number, size] = self.cache[size].pop()
            return
        start, end = self._find(size) or self._grow(size)
        self.used[number, size] = start, start + size
        if end > start + size:
            self._release(start + size, end)

    def _find(self, size: int) -> tuple[int, int] | None:
        """The smallest free piece of at least this size, taken out."""
        place = bisect.bisect_left(self.free, (size, 0))
        if place == len(self.free):
            return None
        length, start = self.free[place]
        return self._take_out(start, start + length)

    def _grow(self, size: int) -> tuple[int, int]:
        start, self.top = self.top, self.top + size
        self.extent = max(self.extent, (self.top + FIRST_THRESHOLD) // PAGE * PAGE)
        return start, self.top

    def _release(self, start: int, end: int) -> None:
        """Give a piece back: joined with its free neighbours, or with the top."""
        if end in self.starts:
            end = self._take_out(end, self.starts[end])[1]
        if start in self.ends:
            start = self._take_out(self.ends[start], start)[0]
        if end == self.top:
            self.top = start
            if self.extent - self.top >= 2 * self.threshold:
                self.extent = (self.top + FIRST_THRESHOLD) // PAGE * PAGE
            return
        bisect.insort(self.free, (end - start, start))
        self.starts[start], self.ends[end] = end, start

    def _take_out(self, start: int, end: int) -> tuple[int, int]:
        self.free.pop(bisect.bisect_left(self.free, (end - start, start)))
        del self.starts[start], self.ends[end]
        return start, end


def _aligned(start: int) -> int:
    """Where a piece at or behind `start` begins, so that its tensor is aligned."""
    first = (start + HEADER + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT - HEADER
    return first if first == start or first - start >= SMALLEST else first + ALIGNMENT

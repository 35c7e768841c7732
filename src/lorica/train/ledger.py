"""What a computation holds in memory, moment by moment, found out without doing it.

Under torch's fake tensors every operation of a model runs in shape alone: the same Python, the same
autograd graph, the same order, but no numbers and no memory. `Ledger` writes down every storage
that comes and goes meanwhile. Nothing is assumed about an architecture: what a layer saves for its
backward pass, what recomputation drops, when autograd lets a tensor go is read off the real graph.

The bytes that live at once are less than what a process holds: its allocator keeps freed memory and
cuts it into pieces. `resident` asks the allocator itself (see `heap`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorica.train.fake import bare
from lorica.train.heap import held

_DEVICE = torch.ops.prim.device.default


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
        device: kind of the device whose memory is meant; None: of all.

    Attributes:
        events: in order.
        live: bytes that live now.
        peak: the most that lived at once.
        peak_at: number of events before the moment of `peak`.
    """

    def __init__(self, vocabulary: int = 0, device: str | None = None) -> None:
        super().__init__()
        self.vocabulary, self.device = vocabulary, device
        self.events: list[Event] = []
        self.live = self.peak = self.peak_at = 0
        self._known: dict[int, tuple[int, int]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is _DEVICE:  # autograd asks for it ten times for every operation
            return _device_of(args[0])
        made = func(*args, **(kwargs or {}))
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.take(leaf)
        return made

    def take(self, tensor: Tensor) -> None:
        """Write down the storage of a tensor, once."""
        if self.device is not None and _device_of(tensor).type != self.device:
            return
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


bare(Ledger)


def _device_of(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


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


def most_alive(events: Iterable[Event]) -> int:
    """Most bytes that live at once."""
    live = peak = 0
    for event in events:
        live += event.size
        peak = max(peak, live)
    return peak


def resident(events: Sequence[Event]) -> int:
    """Most bytes that a process on a CPU would hold for these events: what its allocator says, or
    what lives at once where that cannot be asked.
    """
    asked = held([(event.number, event.size) for event in events])
    return max(most_alive(events), asked or 0)

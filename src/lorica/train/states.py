"""Where hidden states of records are kept between the epochs: in memory, or in a file.

A state is a tensor (tokens, width), found by a digest of what it was computed from. A store has a
budget; what does not fit any more is not kept, and the first that came stay: records come in
another order in each epoch, so each of them is as likely to be met again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorica.records.atomic import write_file

Key = bytes
_ENTRY = np.dtype([("key", "S64"), ("start", "<i8"), ("bytes", "<i8"), ("crc", "<u4")])
_DIGEST_SIZE = hashlib.sha256().digest_size


class States(Protocol):
    """A store of states."""

    def get(self, key: Key) -> Tensor | None:
        """The state, on the CPU; None where it is not kept."""
        ...

    def put(self, key: Key, state: Tensor) -> None:
        """Keep a state, where there is room."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class StatesInMemory:
    """A table of tensors of at most `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.room = budget
        self._kept: dict[Key, Tensor] = {}

    def get(self, key: Key) -> Tensor | None:
        return self._kept.get(key)

    def put(self, key: Key, state: Tensor) -> None:
        if key not in self._kept and state.nbytes <= self.room:
            self._kept[key] = state.cpu()
            self.room -= state.nbytes

    def close(self) -> None:
        self._kept.clear()


class StatesOnDisk:
    """A file of states, with an index beside it that is written when the store is closed.

    A later run that computes the same states reads them again. Every state is checked by its CRC-32
    when it is read; without an index, or with a damaged one, the file is begun anew, so that a stop
    at any moment costs no more than computing again. A file that another process uses is left to
    it, and this one has a nameless one.

    Args:
        file: without a suffix; its name tells what the states depend on beside their keys.
        width, dtype: of the states.
        budget: bytes of the file.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, file: Path, *, width: int, dtype: torch.dtype, budget: int) -> None:
        self.width, self.dtype, self.budget = width, dtype, budget
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._index: Path | None = file.with_suffix(".index")
        self._data = os.open(f"{file}.states", os.O_RDWR | os.O_CREAT, 0o600)
        self._entries: dict[Key, tuple[int, int, int]] = {}
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._entries = _read_index(self._index)
        except BlockingIOError:
            os.close(self._data)
            self._data, name = tempfile.mkstemp(dir=file.parent)
            os.unlink(name)
            self._index = None
        self._end = max((start + size for start, size, _ in self._entries.values()), default=0)

    def get(self, key: Key) -> Tensor | None:
        found = self._entries.get(key)
        if found is None:
            return None
        start, size, crc = found
        raw = bytearray(os.pread(self._data, size, start))
        if len(raw) != size or zlib.crc32(raw) != crc:
            del self._entries[key]
            return None
        return torch.frombuffer(raw, dtype=torch.uint8).view(self.dtype).view(-1, self.width)

    def put(self, key: Key, state: Tensor) -> None:
        size = state.nbytes
        if key in self._entries or self._end + size > self.budget:
            return
        raw = state.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        try:
            if os.pwrite(self._data, raw, self._end) != size:
                return
        except OSError:  # the disk is full: what is there stays
            self.budget = self._end
            return
        self._entries[key] = self._end, size, zlib.crc32(raw)
        self._end += size

    def close(self) -> None:
        if self._index is not None:
            _write_index(self._index, self._entries)
        os.close(self._data)


def _write_index(file: Path, entries: dict[Key, tuple[int, int, int]]) -> None:
    rows = [(key.hex().encode(), *facts) for key, facts in entries.items()]
    raw = np.array(rows, _ENTRY).tobytes()
    write_file(file, hashlib.sha256(raw).digest() + raw, mode=0o600)


def _read_index(file: Path) -> dict[Key, tuple[int, int, int]]:
    """Empty where there is none, or a damaged one."""
    try:
        whole = file.read_bytes()
    except FileNotFoundError:
        return {}
    digest, raw = whole[:_DIGEST_SIZE], whole[_DIGEST_SIZE:]
    if hashlib.sha256(raw).digest() != digest:
        return {}
    rows = np.frombuffer(raw, _ENTRY).tolist()
    return {bytes.fromhex(key.decode()): (start, size, crc) for key, start, size, crc in rows}

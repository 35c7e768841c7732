"""A safetensors file from a stranger, read strictly; and one of ours, written with the same bytes
every time.

Layout: 8 bytes header length (little endian), a JSON header {name: {dtype, shape, data_offsets}},
then the data. Every number of the header is checked against the size of the file before a byte of
data is read or allocated.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from safetensors.torch import save
from torch import Tensor

from lorica.errors import AdapterFileError
from lorica.files.folder import open_regular, parse_json
from lorica.records.atomic import write_file

MAX_FILE_BYTES = 16 * 2**30
MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,  # the places of sparse updates
}
"""What the tensors of an adapter may be made of."""

_MEND = "the file is damaged or hostile; get it again from a source that you trust"
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor; `start` and `end` are bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file whose header was found sound.

    Attributes:
        entries: name -> `Entry`, in the order of the data.
        metadata: what the writer noted beside the tensors.

    Args:
        allow_empty: take tensors without elements, which are a sign of sharded ones elsewhere.

    Raises:
        AdapterFileError: the file is not regular, too large, or its header is not exactly right.
    """

    def __init__(self, path: str | Path, *, allow_empty: bool = False) -> None:
        self.path = Path(path)
        self._file: BinaryIO = open_regular(self.path)
        try:
            self.entries, self._data_start, self.metadata = _read_header(
                self._file, self.path, allow_empty
            )
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str) -> Tensor:
        """One tensor, finite in every element.

        Raises:
            AdapterFileError: an element is NaN or infinite, or the file became shorter meanwhile.
        """
        entry = self.entries[name]
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        view = memoryview(cast(Any, raw.numpy()))
        self._file.seek(self._data_start + entry.start)
        while view:
            count = self._file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise AdapterFileError(f"{self.path} became shorter while it was read")
            view = view[count:]
        tensor = raw.view(entry.dtype).view(entry.shape)
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise AdapterFileError(
                f"{self.path}: {bad} of {tensor.numel()} elements of {name} are NaN or infinite",
                mend="train again from the last good checkpoint; such an adapter answers with NaN",
            )
        return tensor


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors whole or not at all; equal tensors give equal bytes.

    Args:
        metadata: noted in the file beside {"format": "pt"}.

    Raises:
        AdapterFileError: a tensor is empty, on the meta device, or not finite. All of them at once.
    """
    problems = [f"{name}: {why}" for name, t in tensors.items() if (why := _unfit(t))]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise AdapterFileError("these tensors are not written", problems=problems[:_SHOWN] + more)
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    raw = save(ready, metadata={"format": "pt"})
    return write_file(path, _with_metadata(raw, metadata) if metadata else raw)


def _with_metadata(raw: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same file with more metadata, in one order: the package's own order is by chance."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    noted = {**header.pop("__metadata__"), **metadata}
    head = json.dumps({"__metadata__": dict(sorted(noted.items())), **header}).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + raw[8 + length :]


def _unfit(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "it has no data (meta device)"
    if not tensor.numel():
        return f"it is empty, of shape {tuple(tensor.shape)}: gather sharded tensors before saving"
    return None if tensor.isfinite().all() else "it has elements that are NaN or infinite"


def _read_header(
    file: BinaryIO, path: Path, allow_empty: bool
) -> tuple[dict[str, Entry], int, dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    if sys.byteorder != "little":
        raise AdapterFileError("safetensors files are read on little-endian machines only")
    if size > MAX_FILE_BYTES:
        raise AdapterFileError(f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
        if first.startswith(_PICKLE_STARTS):
            raise AdapterFileError(f"{path} is a pickle or a zip under another name", mend=_MEND)
        raise AdapterFileError(
            f"{path} is no safetensors file: a header of {length:,} bytes in a file of {size:,}",
            expected=f"a header of at most {MAX_HEADER_BYTES:,} bytes within the file",
            mend=_MEND,
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise AdapterFileError(f"{path}: the header does not start with {{", mend=_MEND)
    header = parse_json(raw, f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    problems = _metadata_problems(metadata)
    if len(header) > MAX_TENSORS:
        problems.append(f"{len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    entries: dict[str, Entry] = {}
    if not problems:
        for name, value in header.items():
            entry = _entry(value, allow_empty)
            if isinstance(entry, Entry):
                entries[name] = entry
            else:
                problems.append(f"{name[:120]}: {entry}")
        problems += [] if problems else _layout_problems(entries, size - 8 - length)
    if problems:
        raise AdapterFileError(
            f"{path} is not a sound safetensors file", problems=problems[:_SHOWN], mend=_MEND
        )
    in_order = dict(sorted(entries.items(), key=lambda item: item[1].start))
    return in_order, 8 + length, metadata


def _metadata_problems(metadata: Any) -> list[str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return ["__metadata__ is no table of strings"]
    return []


def _entry(value: Any, allow_empty: bool) -> Entry | str:
    """The checked entry, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets, and nothing else"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {str(dtype)[:20]!r}; an adapter holds {', '.join(DTYPES)}"
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        return f"its shape is not a list of at most {MAX_DIMENSIONS} whole numbers"
    if not _whole_numbers(offsets) or len(offsets) != 2:
        return "data_offsets are not two whole numbers"
    bytes_needed = math.prod(shape) * DTYPES[dtype].itemsize
    if not bytes_needed and not allow_empty:
        return f"it is empty, of shape {shape}"
    if offsets[1] - offsets[0] != bytes_needed:
        return f"{offsets[1] - offsets[0]} bytes of data, where its shape needs {bytes_needed}"
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _layout_problems(entries: Mapping[str, Entry], size: int) -> list[str]:
    """Overlaps, holes, and data that is missing or left over."""
    problems, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            what = "overlaps the one before" if entry.start < end else "comes after a hole"
            problems.append(f"{name[:120]} {what} (byte {entry.start}, expected {end})")
        end = max(end, entry.end)
    if end != size:
        problems.append(f"the tensors end at byte {end}, the data at byte {size}")
    return problems

"""A GGUF file of a stranger, with every way in which it can be broken told as one error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.errors import AdapterFileError
from lorica.files.folder import open_regular
from lorica.files.gguf_names import package

MAGIC = b"GGUF"
MAX_TENSORS, MAX_FIELDS = 20_000, 10_000
_MEND = "the file is damaged or cut short; get it again from a source that you trust"


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds.

    Attributes:
        fields: the metadata by key, as Python values.
        tensors: by name, in float32, in the order of dimensions that torch has.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Everything in a small file, such as an adapter.

    Raises:
        AdapterFileError: the file is cut short, has a name twice, numbers that are not finite, or
            sizes that do not agree.
        MissingPackage: gguf is not installed.
    """
    gguf = package()
    _check_head(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: entry.contents() for key, entry in reader.fields.items()}
        tensors = {one.name: _tensor(gguf, one) for one in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise AdapterFileError(
            f"{path} is not a sound GGUF file: {str(error)[:200] or type(error).__name__}",
            mend=_MEND,
        ) from error
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise AdapterFileError(
            f"{path}: {len(bad)} tensors have elements that are NaN or infinite",
            problems=bad[:5],
            mend="train again from the last good checkpoint; such an adapter answers with NaN",
        )
    return GGUFFile(fields, tensors)


def _check_head(path: Path) -> None:
    """The counts of the header, before anything is read by them."""
    with open_regular(path) as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != MAGIC:
        raise AdapterFileError(f"{path} is no GGUF file", mend=_MEND)
    version = int.from_bytes(head[4:8], "little")
    num_tensors, num_fields = (int.from_bytes(head[i : i + 8], "little") for i in (8, 16))
    if version not in (2, 3):
        raise AdapterFileError(
            f"{path} is of version {version} of GGUF", expected="version 2 or 3, little-endian"
        )
    if num_tensors > MAX_TENSORS or num_fields > MAX_FIELDS:
        raise AdapterFileError(
            f"{path} says that it holds {num_tensors:,} tensors and {num_fields:,} fields",
            expected=f"at most {MAX_TENSORS:,} and {MAX_FIELDS:,}",
            mend=_MEND,
        )


def _tensor(gguf: Any, entry: Any) -> Tensor:
    """One tensor in float32, whatever it is stored in."""
    values = gguf.quants.dequantize(entry.data, entry.tensor_type)
    shape = tuple(int(size) for size in reversed(entry.shape))
    return torch.from_numpy(np.array(values, dtype=np.float32, copy=True)).reshape(shape)

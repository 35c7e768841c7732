"""A safetensors file that is written tensor by tensor, so that one of them is in memory at a time.

The header of the format says where every tensor lies, and is known before the first of them is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lorica.errors import BaseModelError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorWriter:
    """Writes tensors of known names, types and shapes, in that order.

    Args:
        path: of a new file.
        entries: name -> (dtype, shape).

    Raises:
        BaseModelError: a type that the format does not have.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in entries.items():
            if dtype not in _NAMES:
                raise BaseModelError(f"{name} is of type {dtype}, which is not written")
            end = start + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.size = start
        self._waiting = dict(entries)
        self._file = open(path, "xb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        expected, (dtype, shape) = next(iter(self._waiting.items()))
        assert (name, dtype, shape) == (expected, tensor.dtype, tuple(tensor.shape))
        del self._waiting[name]
        plain = tensor.detach().cpu().contiguous()
        if plain.numel():
            self._file.write(plain.view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        assert error is not None or not self._waiting, "tensors are missing"

"""Eight bits a number, with a scale for every row: the state dict of bitsandbytes' Linear8bitLt.

    w = place * absmax / 127,  place = round(w * (127 / absmax)),  absmax = max |w| of the row

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (arXiv
2208.07339), section 2.1, the weight alone: inputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lorica.base.quantizer import Stored
from lorica.errors import BaseModelError
from lorica.ops.four_bit import Form

_ROWS = 2**17
"""Numbers that are packed at a time, about."""


@dataclass(frozen=True)
class Int8:
    """A byte for a number, and a scale in float32 for each row (output)."""

    word: ClassVar[str] = "int8"

    def settings(self) -> str:
        return "int8 with a scale for each output"

    def problems(self, shape: tuple[int, ...]) -> list[str]:
        return []

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Stored:
        weight = torch.empty(shape, dtype=torch.int8, device=device)
        return {"weight": weight, "SCB": torch.empty(shape[0], dtype=torch.float32, device=device)}

    def pack(self, weight: Tensor) -> Stored:
        stored = self.empty(tuple(weight.shape), weight.device)
        step = max(1, _ROWS // weight.shape[1])
        for start in range(0, len(weight), step):
            part = weight[start : start + step].float()
            scales = part.abs().amax(1)
            factors = torch.where(scales > 0, 127.0 / scales, 0.0)
            stored["weight"][start : start + step] = (part * factors[:, None]).round()
            stored["SCB"][start : start + step] = scales
        return stored

    def unpack(self, stored: Mapping[str, Tensor], out: Tensor) -> None:
        if isinstance(out, FakeTensor):
            return
        scales = (stored["SCB"] * (1 / 127))[:, None]
        if out.dtype == torch.float32:
            out.copy_(stored["weight"]).mul_(scales)
        else:  # rounded once
            torch.mul(stored["weight"], scales, out=out)

    def form(self) -> Form | None:
        return None

    def entries(self, stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        row_major = torch.tensor(0, dtype=torch.uint8, device=stored["SCB"].device)
        return {**stored, "weight_format": row_major}

    def read(self, entries: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        problems = []
        for name, like in self.empty(shape, torch.device("meta")).items():
            given = entries.get(name)
            if given is None:
                problems.append(f"{name} is missing")
            elif given.shape != like.shape or given.dtype != like.dtype:
                problems.append(
                    f"{name} is {tuple(given.shape)} of {given.dtype}; expected "
                    f"{tuple(like.shape)} of {like.dtype}"
                )
            elif given.is_floating_point() and not given.isfinite().all():
                problems.append(f"{name} is not finite")
        if int(entries.get("weight_format", torch.tensor(0))) != 0:
            problems.append("its bytes lie in the order of a GPU kernel, not row after row")
        if problems:
            raise BaseModelError("a quantized weight cannot be read", problems=problems)
        return {name: entries[name] for name in ("weight", "SCB")}


def stored_as(entries: Mapping[str, Tensor]) -> Int8 | None:
    """The quantizer of this file, where these entries of a state dict are its."""
    return Int8() if "SCB" in entries else None

"""NF4 and FP4, with the settings and the state dict of bitsandbytes' Linear4bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lorica.base.quantizer import Stored
from lorica.errors import BaseModelError
from lorica.ops import four_bit

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class FourBit:
    """Four bits a number, in blocks with a scale each (`ops.four_bit`).

    Attributes:
        block_size: numbers that share a scale.
        double_quant: the scales themselves in 8 bits: 4.13 bits a number instead of 4.5.
    """

    block_size: int = 64
    double_quant: bool = True

    word: ClassVar[str]

    def settings(self) -> str:
        doubly = ", scales in 8 bits" if self.double_quant else ""
        return f"{self.word} in blocks of {self.block_size}{doubly}"

    def problems(self, shape: tuple[int, ...]) -> list[str]:
        if self.block_size not in BLOCKS:
            return [f"block_size is {self.block_size!r}; there are {', '.join(map(str, BLOCKS))}"]
        return []

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Stored:
        number = torch.Size(shape).numel()
        blocks = -(-number // self.block_size)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        stored = {"weight": new((number + 1) // 2, 1, dtype=torch.uint8)}
        if not self.double_quant:
            return {**stored, "absmax": new(blocks)}
        return {
            **stored,
            "absmax": new(blocks, dtype=torch.uint8),
            "nested_absmax": new(-(-blocks // four_bit.NEST)),
            "nested_offset": new(),
        }

    def pack(self, weight: Tensor) -> Stored:
        packed, absmax = four_bit.quantize(weight, self.word, self.block_size)
        if not self.double_quant:
            return {"weight": packed, "absmax": absmax}
        places, scales, offset = four_bit.compress(absmax)
        nested = {"nested_absmax": scales, "nested_offset": offset}
        return {"weight": packed, "absmax": places, **nested}

    def unpack(self, stored: Mapping[str, Tensor], out: Tensor) -> None:
        if isinstance(out, FakeTensor):
            return
        absmax = stored["absmax"]
        if self.double_quant and not absmax.is_meta:
            absmax = four_bit.expand(absmax, stored["nested_absmax"], stored["nested_offset"])
        four_bit.dequantize(stored["weight"], absmax, self.word, self.block_size, out)

    def form(self) -> four_bit.Form | None:
        return four_bit.Form(self.word, self.block_size)

    def entries(self, stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        device = stored["weight"].device
        facts: dict[str, Any] = {
            "quant_type": self.word,
            "blocksize": self.block_size,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        found = {"weight": stored["weight"], "weight.absmax": stored["absmax"]}
        found["weight.quant_map"] = four_bit.book_values(self.word, device).clone()
        if self.double_quant:
            found["weight.nested_absmax"] = stored["nested_absmax"]
            found["weight.nested_quant_map"] = four_bit.nested_map(device).clone()
            facts |= {
                "nested_blocksize": four_bit.NEST,
                "nested_dtype": "float32",
                "nested_offset": stored["nested_offset"].item() if not _fake(stored) else 0.0,
            }
        text = json.dumps(facts).encode()
        found[_STATE + self.word] = torch.tensor(list(text), dtype=torch.uint8, device=device)
        return found

    def read(self, entries: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        facts = _facts(entries.get(_STATE + self.word), self.word)
        wanted = {
            "blocksize": self.block_size,
            "shape": list(shape),
            "quant_type": self.word,
            **({"nested_blocksize": four_bit.NEST} if self.double_quant else {}),
        }
        problems = [
            f"its {key} is {facts.get(key)!r}; expected {value!r}"
            for key, value in wanted.items()
            if facts.get(key) != value
        ]
        stored = {}
        for name, like in self.empty(shape, torch.device("meta")).items():
            if name == "nested_offset":
                stored[name] = torch.tensor(float(facts.get("nested_offset", "nan")))
                continue
            given = entries.get(f"weight.{name}" if name != "weight" else name)
            if given is None:
                problems.append(f"{name} is missing")
            elif given.shape != like.shape or given.dtype != like.dtype:
                problems.append(
                    f"{name} is {tuple(given.shape)} of {given.dtype}; expected "
                    f"{tuple(like.shape)} of {like.dtype}"
                )
            else:
                stored[name] = given
                if given.is_floating_point() and not given.isfinite().all():
                    problems.append(f"{name} is not finite")
        book = entries.get("weight.quant_map")
        if book is not None and not torch.equal(book.cpu(), four_bit.book_values(self.word, _CPU)):
            problems.append(f"its quant_map is not that of {self.word}")
        if not all(t.isfinite().all() for n, t in stored.items() if n == "nested_offset"):
            problems.append("its nested_offset is missing or not finite")
        if problems:
            raise BaseModelError("a quantized weight cannot be read", problems=problems)
        return stored


_CPU = torch.device("cpu")


def _fake(stored: Stored) -> bool:
    """Whether there are no numbers."""
    return any(t.is_meta or isinstance(t, FakeTensor) for t in stored.values())


def _facts(raw: Tensor | None, word: str) -> dict[str, Any]:
    """What a state dict says of a weight in words."""
    if raw is None:
        raise BaseModelError(
            "a quantized weight cannot be read", problems=[f"it has no {_STATE}{word}"]
        )
    try:
        found = json.loads(bytes(raw.cpu().tolist()).decode())
    except (ValueError, TypeError) as error:
        raise BaseModelError(
            "a quantized weight cannot be read", problems=[f"its quant_state is no JSON: {error}"]
        ) from error
    return found if isinstance(found, dict) else {}


def stored_as(entries: Mapping[str, Tensor]) -> FourBit | None:
    """The quantizer that made these entries of a state dict; None where none of this file did."""
    for kind in (NF4, FP4):
        if (raw := entries.get(_STATE + kind.word)) is not None:
            block = _facts(raw, kind.word).get("blocksize")
            return kind(block, "weight.nested_absmax" in entries)  # type: ignore[arg-type]
    return None


@dataclass(frozen=True)
class NF4(FourBit):
    """Values that a normal distribution fills equally."""

    word: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(FourBit):
    """A float of four bits."""

    word: ClassVar[str] = "fp4"

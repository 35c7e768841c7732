"""LISA: full fine-tuning of a few layers at a time, drawn anew every so many steps.

Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning" (NeurIPS 2024, arXiv 2403.17919), algorithm 1. What lies outside of the layers
(embeddings, last norm, head) trains all the time. A layer at rest has no gradients, and AdamW
forgets its moments, as in the trainer of the authors' LMFlow; a layer that is drawn twice in a row
keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorica.methods.between import Between, Held
from lorica.methods.method import setting
from lorica.methods.placed import rank_problems
from lorica.methods.selective import Selective


@dataclass(frozen=True)
class LISA(Selective):
    """Which layers are drawn from, how many, and how often. Names as in LMFlow."""

    lisa_activated_layers: int = setting(2, "layers that train at a time")
    lisa_interval_steps: int = setting(20, "the layers are drawn anew every so many steps")
    lisa_ends: bool = setting(
        True, "embeddings, head and all else outside of the layers train in every step; or never"
    )

    kind: ClassVar[str] = "lisa"
    title: ClassVar[str] = "full tuning of a few layers, drawn anew (arXiv 2403.17919)"

    @property
    def outside(self) -> bool:
        return self.lisa_ends

    @property
    def ties(self) -> bool:
        return True

    def between(self, held: Held, *, total: int, seed: int) -> Draws:
        """The draws of a run."""
        return Draws(self, held, seed)

    def _problems(self) -> list[str]:
        found = super()._problems()
        for name in ("lisa_activated_layers", "lisa_interval_steps"):
            found += rank_problems(name, getattr(self, name))
        return found


class Draws(Between):
    """Which layers rest. A draw depends on the seed and its number alone, so nothing is kept."""

    def __init__(self, method: LISA, held: Held, seed: int) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.blocks: dict[str, list[str]] = {}
        for path in held:
            if (block := block_of(path)) is not None:
                self.blocks.setdefault(block, []).append(path)

    def problems(self) -> list[str]:
        wanted, there = self.method.lisa_activated_layers, len(self.blocks)
        if wanted <= there:
            return []
        return [f"lisa_activated_layers={wanted}, but {there} layers have parameters to train"]

    def note(self) -> str | None:
        count, every = self.method.lisa_activated_layers, self.method.lisa_interval_steps
        there = len(self.blocks)
        return f"{count} of {there} layers train at a time, drawn anew every {every} steps"

    def active(self, step: int) -> list[str]:
        """The layers that train in the step after `step` of them, in the order of the model."""
        number = step // self.method.lisa_interval_steps
        digest = hashlib.sha256(f"{self.seed}/lisa/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn = torch.randperm(len(self.blocks), generator=generator)
        chosen = drawn[: self.method.lisa_activated_layers].sort().values.tolist()
        return [list(self.blocks)[i] for i in chosen]

    def at_rest(self, step: int) -> Collection[str]:
        active = set(self.active(step))
        return [p for block, paths in self.blocks.items() if block not in active for p in paths]


def block_of(path: str) -> str | None:
    """The path of the layer that holds a place: up to its first number."""
    parts = path.split(".")
    ends = (i for i, part in enumerate(parts, 1) if part.isdecimal())
    return ".".join(parts[:end]) if (end := next(ends, None)) else None

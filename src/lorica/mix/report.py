"""What merging did, weight by weight, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorica.errors import MergeError
from lorica.mix.undo import Undo


@dataclass(frozen=True)
class MergedWeight:
    """What merging did to one weight.

    Attributes:
        path: of the parameter.
        shape, dtype: of the parameter.
        update: root mean square of the exact update.
        damage: root mean square of (rounded - exact) over `update`; 0 where there was no update.
        changed: share of the elements whose stored value changed.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    update: float
    damage: float
    changed: float


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        weights: adapter -> its weight in the mixture.
        merged: one entry per parameter, in the order of the adapters' places.
        untied: parameters that were tied before and have values of their own now.
    """

    weights: Mapping[str, float]
    merged: tuple[MergedWeight, ...]
    untied: tuple[str, ...] = ()
    _replaced: Undo | None = field(default=None, repr=False, compare=False)

    def undo(self) -> None:
        """Take the adapters out of the base again, and put them back on it.

        What was replaced was kept, so every weight has the very bits that it had; subtracting the
        update would leave the rounding of both ways. Handles of the adapters stay valid.

        Raises:
            MergeError: nothing was kept, it was undone already, or a weight was changed since.
        """
        if self._replaced is None:
            raise MergeError(
                "the weights that this merge replaced were not kept",
                mend="merge(..., keep=True), or load the base again",
            )
        self._replaced.run()

    def facts(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        merged = [{**vars(weight), "shape": list(weight.shape)} for weight in self.merged]
        return {
            "weights": dict(self.weights),
            "damage": self.damage,
            "merged": merged,
            "untied": list(self.untied),
        }

    @property
    def damage(self) -> float:
        """Root mean square of all rounding errors over that of all updates."""
        sizes = [math.prod(weight.shape) for weight in self.merged]
        update = sum(n * w.update**2 for n, w in zip(sizes, self.merged, strict=True))
        error = sum(n * (w.update * w.damage) ** 2 for n, w in zip(sizes, self.merged, strict=True))
        return math.sqrt(error / update) if update else 0.0

    def __str__(self) -> str:
        mixture = ", ".join(f"{name} x {weight:g}" for name, weight in self.weights.items())
        lines = [
            f"merged {mixture} into {len(self.merged)} weights; rounding damage {self.damage:.2%}"
        ]
        lines += [f"  untied: {path}" for path in self.untied]
        width = max((len(w.path) for w in self.merged), default=0)
        lines.append(
            f"  {'weight':<{width}}  {'dtype':<9} {'update':>9} {'damage':>8} {'changed':>8}"
        )
        lines += [
            f"  {w.path:<{width}}  {w.dtype:<9} {w.update:>9.2e} {w.damage:>8.2%} {w.changed:>8.1%}"
            for w in self.merged
        ]
        return "\n".join(lines)

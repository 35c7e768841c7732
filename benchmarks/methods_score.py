"""From the runs of `methods.py` to the figures in results/methods-*.json.

A score is the mean over seeds. Its interval is the 95 % interval of a bootstrap that draws both
the test records and the seeds with replacement, since either could have been others. A difference
is paired: both methods are scored on the same drawn records, with seeds drawn for each. With so few
seeds this is a little narrow: three draws from three seeds vary by two thirds of their variance.
"""

from __future__ import annotations

import statistics
from typing import Any
from zlib import crc32

import numpy as np

DRAWS = 4000
REFERENCE = "lora"


def figures(found: dict[str, dict[str, dict]]) -> dict[str, dict[str, Any]]:
    """Name -> what is told of it.

    Args:
        found: name -> side -> what the worker wrote.
    """
    drawn = Draws(found)
    return {
        name: {
            "word": sides["lorica"]["group"]["job"]["method"],
            "settings": sides["lorica"]["group"]["job"]["method_settings"],
            "learning_rate": sides["lorica"]["learning_rate"],
            "tuning": sides["lorica"]["tuning"],
            "sides": {side: costs(own) | drawn.of(name, side) for side, own in sides.items()},
        }
        for name, sides in found.items()
        if "lorica" in sides
    }


def costs(own: dict) -> dict[str, Any]:
    """What a method costs, as the median over its runs, or as one run has it."""
    runs = own["runs"]
    return {
        "num_trainable": runs[0]["num_trainable"],
        "adapter_bytes": runs[0]["adapter_bytes"],
        "peak_memory_bytes": own["peak_memory_bytes"],
        "step_seconds": statistics.median(run["step_seconds"] for run in runs),
        "start_seconds": statistics.median(run["start_seconds"] for run in runs),
    }


class Draws:
    """Scores under the same draws of test records for all methods."""

    def __init__(self, found: dict[str, dict[str, dict]]) -> None:
        self.seen = {
            (name, side): np.array([run["records"] for run in own["runs"]], dtype=np.float64)
            for name, sides in found.items()
            for side, own in sides.items()
        }  # (seeds, records, 2): value and weight
        num_records = next(iter(self.seen.values())).shape[1]
        generator = np.random.default_rng(0)
        self.counts = generator.multinomial(
            num_records, np.full(num_records, 1 / num_records), size=DRAWS
        ).astype(np.float64)
        self.drawn = {
            key: self._drawn(values, np.random.default_rng(crc32(" ".join(key).encode())))
            for key, values in self.seen.items()
        }

    def _drawn(self, values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The score in every draw: (DRAWS,)."""
        by_seed = (self.counts @ values[..., 0].T) / (self.counts @ values[..., 1].T)
        chosen = generator.integers(len(values), size=(DRAWS, len(values)))
        return np.take_along_axis(by_seed, chosen, axis=1).mean(axis=1)

    def of(self, name: str, side: str) -> dict[str, Any]:
        """Score, interval, seeds, and the differences that can be asked for."""
        values = self.seen[name, side]
        by_seed = values[..., 0].sum(1) / values[..., 1].sum(1)
        found = {
            "score": float(by_seed.mean()),
            "interval": interval(self.drawn[name, side]),
            "by_seed": by_seed.tolist(),
        }
        against = {"lora": (REFERENCE, side)} if name != REFERENCE else {}
        if side == "peft":
            against["lorica"] = (name, "lorica")
        kind, _, selection = name.partition(": ")
        if selection and selection != "random":
            against["random"] = (f"{kind}: random", side)
        found["against"] = {
            word: self.difference((name, side), other)
            for word, other in against.items()
            if other in self.seen
        }
        return found

    def difference(self, one: tuple[str, str], other: tuple[str, str]) -> dict[str, Any]:
        """Of the scores, one minus other."""
        scores = [
            float((v[..., 0].sum(1) / v[..., 1].sum(1)).mean())
            for v in (self.seen[one], self.seen[other])
        ]
        return {
            "difference": scores[0] - scores[1],
            "interval": interval(self.drawn[one] - self.drawn[other]),
        }


def interval(drawn: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return [float(value) for value in np.quantile(drawn, (0.025, 0.975))]

"""Several runs that differ in their seed alone: what their scores have in common.

A score of one seed says little where records are few; median and worst say what to expect (Zhang et
al. 2021, arXiv 2006.05987, section 4; Mosbach et al. 2021, arXiv 2006.04884).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from lorica.records.phrases import decimals, fixed, metric_name, number


def summary(manifests: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What run.json says of all seeds.

    Args:
        manifests: seed -> run.json of its run, finished.

    Returns:
        {"scores": {metric: {"higher_is_better", "base", "tuned": {seed: value}, "median", "worst",
        "worst_seed"}}, "typical": the seed whose first score lies nearest to its median}.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for seed, manifest in manifests.items():
        for metric, score in dict(manifest.get("scores") or {}).items():
            if (value := number(score.get("tuned"))) is not None:
                one = metrics.setdefault(metric, {"tuned": {}, "base": {}})
                one["higher_is_better"] = bool(score.get("higher_is_better", True))
                one["tuned"][str(seed)] = value
                one["base"][str(seed)] = number(score.get("base"))
    for manifest_seed, manifest in manifests.items():
        losses = dict(dict(manifest.get("training") or {}).get("eval_loss") or {})
        for value in filter(None, map(number, losses.values())):
            one = metrics.setdefault("eval_loss", {"tuned": {}, "base": {}})
            one["higher_is_better"] = False
            one["tuned"][str(manifest_seed)] = value
    for one in metrics.values():
        values = one["tuned"]
        pick = min if one["higher_is_better"] else max
        one["worst_seed"] = int(pick(values, key=values.__getitem__))
        one["worst"] = values[str(one["worst_seed"])]
        one["median"] = statistics.median(values.values())
        bases = {value for value in one["base"].values() if value is not None}
        one["base"] = statistics.median(bases) if bases else None
    return {"scores": metrics, "typical": _typical(metrics, next(iter(manifests)))}


def _typical(metrics: Mapping[str, Mapping[str, Any]], otherwise: int) -> int:
    first = next(iter(metrics.values()), None)
    if first is None:
        return otherwise
    tuned = first["tuned"]
    return int(min(tuned, key=lambda seed: abs(tuned[seed] - first["median"])))


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A table of a summary, its header first: metric, base, median, worst, and every seed."""
    scores = found.get("scores")
    entries = scores if isinstance(scores, dict) else {}
    seeds = list(dict.fromkeys(seed for one in entries.values() for seed in one.get("tuned", {})))
    table = [["metric", "base", "median", "worst", *(f"seed {seed}" for seed in seeds)]]
    for metric, one in entries.items():
        values = {seed: number(one["tuned"].get(seed)) for seed in seeds}
        digits = decimals(max((abs(v) for v in values.values() if v is not None), default=0.0))
        cells = [number(one.get("base")), number(one.get("median")), number(one.get("worst"))]
        cells += values.values()
        table.append([metric_name(metric), *(fixed(cell, digits) for cell in cells)])
    return table if len(table) > 1 else []

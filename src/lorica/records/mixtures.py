"""Adapters at several weights at once: what they score, as a table and as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorica.records.phrases import count, fixed, metric_name, number
from lorica.records.plots import INK, SERIES, STYLE, svg


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """A head, then a row for each mixture: the weight of each adapter, and its scores."""
    metrics = list(found["mixtures"][0]["scores"])
    rows = [[*map(str, found["adapters"]), *map(metric_name, metrics)]]
    for mixture in found["mixtures"]:
        scores = [number(mixture["scores"][metric]["value"]) for metric in metrics]
        rows.append([*(f"{w:g}" for w in mixture["weights"]), *(fixed(s, 3) for s in scores)])
    return rows


def section(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the report prints; None where the run mixed nothing."""
    found = manifest.get("mixtures")
    if not isinstance(found, Mapping) or not found.get("mixtures"):
        return None
    rows = table(found)
    outputs = [str(mixture.get("output") or "") for mixture in found["mixtures"]]
    return {
        "header": [*rows[0], "answer"],
        "rows": [[*row, text] for row, text in zip(rows[1:], outputs, strict=True)],
        "input": str(found.get("input") or ""),
        "num_records": count(found.get("num_records")),
        "figure": figure(found),
    }


def figure(found: Mapping[str, Any]) -> str:
    """Bars of every score, which lie between 0 and 1, side by side for each mixture."""
    mixtures: Sequence[Mapping[str, Any]] = found["mixtures"]
    metrics = list(mixtures[0]["scores"])
    width = 0.8 / len(metrics)
    with rc_context(STYLE):
        drawn = Figure(figsize=(9.2, 2.4), layout="constrained")
        axes = drawn.add_subplot()
        for index, metric in enumerate(metrics):
            heights = [number(one["scores"][metric]["value"]) or 0.0 for one in mixtures]
            places = [place + (index + 0.5) * width - 0.4 for place in range(len(mixtures))]
            bars = axes.bar(places, heights, 0.94 * width, color=SERIES[index])
            bars.set_label(metric_name(metric))
            axes.bar_label(bars, fmt="%.2f", fontsize=8.5, color=INK, padding=2)
        labels = [
            "\n".join(f"{n} {w:g}" for n, w in zip(found["adapters"], one["weights"], strict=True))
            for one in mixtures
        ]
        axes.set_xticks(range(len(mixtures)), labels, color=INK)
        axes.set_ylim(0, 1.14)
        axes.set_yticks([0, 0.5, 1])
        axes.grid(visible=False, axis="x")
        axes.tick_params(length=0)
        drawn.legend(loc="outside upper center", ncols=len(metrics), fontsize=9)
        return svg(drawn, "mixtures", "Scores by the weights of the adapters")

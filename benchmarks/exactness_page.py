"""docs/exactness.md from the figures in benchmarks/results/exactness.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import RESULTS

from exact.measured import TOLERANCES

PAGE = Path(__file__).resolve().parents[1] / "docs/exactness.md"
HEAD = """# How exact

Every figure comes from `python benchmarks/exactness.py`, which anyone can run again; this page is
written by it. `tests/exact` holds the same figures to tolerances, with the same code. Differences
are relative to the largest number of a tensor, and the largest of all.
"""
HELD = """## Held by tests alone

| what | how close | test |
|---|---|---|
| forward, loss, gradients, AdamW over 200 steps, against equations in NumPy (float64) | 1e-12 | `tests/exact/test_oracle.py` |
| gradients of every kind of layer and method against differences (`gradcheck`, float64) | 1e-8 | `tests/contract` |
| attach, then detach: objects and bits of the base | equal | `tests/exact/test_laws.py` |
| an adapter that was not trained: outputs of the base | equal | `tests/contract` |
| adapters trained together, and each alone | equal | `tests/train/test_engine.py` |
| packed records, and each alone: loss; gradients | 1e-5; 1e-4 | `tests/train/test_engine.py` |
| packed records: losses of the others when one changes | equal | `tests/train/test_engine.py` |
| saved and loaded, any finite tensors and names | equal | `tests/exact/test_laws.py` |
| merged and attached, by dtype: `4 u` of the size of input and weight | `u` is 2^-24, 2^-11, 2^-8 | `tests/exact/test_laws.py`, `tests/mix` |
"""  # noqa: E501


def page() -> str:
    """The text of docs/exactness.md, from the figures that there are."""
    figures = json.loads((RESULTS / "exactness.json").read_text(encoding="utf-8"))
    rows = [
        "## Twenty steps beside PEFT",
        "",
        "The same start, records and settings; PEFT's model in a plain loop with padded batches,",
        "the loss of transformers, clipping and AdamW. AdamW divides a gradient by its own size:",
        "where one is almost zero, factors in float32 differ by more than losses do. In float64",
        "the difference is gone (losses of causal models in transformers are float32 always).",
        "",
        "| architecture | dtype | loss | factors |",
        "|---|---|---|---|",
    ]
    for row in figures["peft"]:
        name, dtype = row["architecture"], row["dtype"]
        rows.append(f"| {name} | {dtype} | {row['loss']:.1e} | {row['factors']:.1e} |")
    rows += [
        "",
        "## The same training in two ways",
        "",
        "| ways | loss | factors |",
        "|---|---|---|",
    ]
    for row in figures["ways"]:
        rows.append(f"| {row['ways']} | {' | '.join(_cells(row))} |")
    stops = figures["interrupts"]
    rows += [
        "",
        "With dropout, but where records lie in other rows and would draw other numbers.",
        "",
        "## Stopped and gone on with",
        "",
        f"A run of {stops['points']} steps with dropout and warm-up, stopped by a signal at every",
        f"step and gone on with: the same adapter to the bit in {stops['same']} of"
        f" {stops['points']}.",
        "",
        "## The golden curve",
        "",
        "Losses, gradient norms, rates and evaluations of a run of 20 steps in float64 are in",
        f"`tests/exact/golden.json`. Largest difference here: {figures['golden']['error']:.1e}; a",
        f"test fails above {TOLERANCES['golden']:.0e}.",
        "",
    ]
    own, packages = figures["machine"], figures["versions"]
    where = f"{own['cpu']}, {own['num_threads']} thread; " + ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "transformers", "peft")
    )
    return "\n".join([HEAD, *rows, HELD, f"Measured on {where}.", ""])


def _cells(row: Mapping[str, Any]) -> list[str]:
    """How close losses and factors of two ways are, in words or as a number."""
    if "same" in row:
        return [
            "promised: the same bits" if row["same"] else "**promised, but not the same bits**"
        ] * 2
    return [f"{row[key]:.1e}" if row[key] else "the same bits here" for key in ("loss", "factors")]

"""How exact training is: beside PEFT, beside itself in other ways, interrupted at every step.

    python benchmarks/exactness.py                    # all parts (minutes), results/exactness.json
    python benchmarks/exactness.py --only peft ways   # these parts; figures of the others stay
    python benchmarks/exactness.py --page             # docs/exactness.md alone, from the figures

The code that measures is that of tests/exact, so that a figure here and the tolerance of a test are
about the same thing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import torch  # noqa: E402
from parts import measure_and_write  # noqa: E402

from exact import golden, measured  # noqa: E402
from exact.peft_loop import NAMES, both  # noqa: E402

PAGE = HERE.parent / "docs" / "exactness.md"


def of_golden(folder: Path) -> dict[str, Any]:
    """Largest relative difference from the golden loss curve."""
    wanted = json.loads(golden.FILE.read_text(encoding="utf-8"))
    return {"error": golden.largest_error(golden.curve(folder / "run"), wanted)}


def of_peft(folder: Path) -> list[dict[str, Any]]:
    """Twenty steps beside a plain loop over PEFT's model, per architecture."""
    rows = []
    for name in NAMES:
        for dtype in (torch.float32, *[torch.float64] * (name in ("bert", "t5"))):
            ours, theirs, our_factors, their_factors = both(name, folder / f"{name}-{dtype}", dtype)
            pairs = zip(ours, theirs, strict=True)
            rows.append(
                {
                    "architecture": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "loss": max(abs(a - b) / abs(b) for a, b in pairs),
                    "factors": measured.difference(our_factors, their_factors),
                }
            )
    return rows


def of_ways(folder: Path) -> list[dict[str, Any]]:
    """The same steps computed in two ways."""
    rows = []
    for name, (one, other) in measured.SAME_BITS.items():
        (losses, factors), (again, factors_again) = map(measured.steps_of, (one, other))
        same = losses == again and measured.digest(factors) == measured.digest(factors_again)
        rows.append({"ways": name, "promise": "the same bits", "same": same})
    for name, pair in {**measured.CLOSE, **measured.CLOSE_IN_FLOAT64}.items():
        loss, factors = measured.errors(*pair)
        rows.append({"ways": name, "promise": "close", "loss": loss, "factors": factors})
    return rows


def of_interrupts(folder: Path) -> dict[str, Any]:
    """Stopped at every one of 40 steps: how many end with the bits of the whole run."""
    whole = measured.short_run(folder / "whole")
    steps = range(1, measured.INTERRUPTED_STEPS + 1)
    same = [measured.interrupted_run(folder / str(k), k) == whole for k in steps]
    return {"points": len(same), "same": sum(same)}


PARTS: Mapping[str, Callable[[Path], Any]] = {
    "peft": of_peft,
    "ways": of_ways,
    "interrupts": of_interrupts,
    "golden": of_golden,
}

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


def page(figures: Mapping[str, Any]) -> str:
    """docs/exactness.md."""
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
        f"test fails above {measured.TOLERANCES['golden']:.0e}.",
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


def _in_a_folder(measured_part: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return measured_part(Path(folder))


def main() -> None:
    parts = {name: partial(_in_a_folder, part) for name, part in PARTS.items()}
    measure_and_write("exactness", (__doc__ or "").splitlines()[0], parts, page, PAGE)


if __name__ == "__main__":
    main()

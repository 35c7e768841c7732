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
from exactness_page import PAGE, page  # noqa: E402
from parts import measure_and_write  # noqa: E402

from exact import golden, measured  # noqa: E402
from exact.peft_loop import NAMES, both  # noqa: E402


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


def _in_a_folder(measured_part: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return measured_part(Path(folder))


def main() -> None:
    parts = {name: partial(_in_a_folder, part) for name, part in PARTS.items()}
    measure_and_write("exactness", (__doc__ or "").splitlines()[0], parts, page, PAGE)


if __name__ == "__main__":
    main()

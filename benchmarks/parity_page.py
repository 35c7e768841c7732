"""docs/parity.md from the figures in benchmarks/results/parity.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs/parity.md"
HEAD = """# Beside PEFT

Every method that PEFT {peft} has too: the same tensors and the same inputs in both, on small
random models. This page is written by `python benchmarks/peft_parity.py`; `tests/parity` holds the
same errors to 1e-5, with the same code.

- **outputs**: largest difference of the logits, divided by the largest logit where that is above 1;
- **gradients**: the same of the gradients of every tensor, of the sum of the squared logits;
- **files**: an adapter of PEFT read by Lorica, written again and read by PEFT; and an adapter that
  began in Lorica read by PEFT. The figure is the larger difference of the logits of the two.

0 means the same bits.
"""
TESTED = """
## Held by tests alone

| what | how close | test |
|---|---|---|
| starts: PiSSA, OLoRA: the product of the first factors | 1e-5 | `test_peft_kinds.py` |
| starts: LoftQ: the product after one and three rounds | 1e-4 | `test_peft_starts.py` |
| starts: EVA: the ranks, and the sine of the largest angle between directions | equal; 1e-3 | \
`test_peft_starts.py` |
| starts: LoRA-GA: the sine of the largest angle | 2e-3 | `test_peft_starts.py` |
| AdaLoRA trained for 14 steps: tensors, importances, budget, what is cut off | 1e-5 | \
`test_peft_adalora.py` |
| prefixes of decoders behind encoders, which PEFT deals out to the layers in its own way | 1e-5 | \
`test_peft_prompts.py` |
| greedy generation with prompts and prefixes | equal tokens | `test_peft_prompts.py` |
| twenty training steps of LoRA on six architectures | 1e-5 | \
[How exact](exactness.md) |

PEFT's LNTuning is `norms` here, and the arithmetic is the same, but the files are not exchanged.
LoRA+ and LoRA-FA are optimizers in PEFT, and their adapters are plain LoRA. Beside these, PEFT
0.21 has methods that Lorica does not have: BOFT, OFT, HRA, VB-LoRA, FourierFT, RandLoRA, C3A,
MiSS, SHiRA and others.
"""
TOUCHED = """
## What a new method touches

RoAd was added last, as a trial of that: `methods/road.py` and one line in `methods/__init__.py`
made it train, save, load, mix, merge and resume, from YAML and from the command line. So that PEFT
reads its files, there is one entry in `files/peft_methods.py` and a word in `files/peft_config.py`.
The tests took one table entry each: in the contract, in the parity with PEFT, and in those of the
command line.
"""


def page() -> str:
    """The text of docs/parity.md, from the figures that there are."""
    figures = json.loads((RESULTS / "parity.json").read_text(encoding="utf-8"))
    layers = figures["layers"]
    parts = [HEAD.format(peft=figures["versions"]["peft"])]
    parts += ["\n## On layers\n", *_errors(layers), "", *_left_out(layers)]
    parts += ["\n## Virtual tokens, and trained tokens\n", *_by_method(figures)]
    parts += [TESTED, "## Lines of code\n", *_code(figures["code"]), TOUCHED]
    packages = figures["versions"]
    where = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft"))
    return "\n".join([*parts, f"Measured on {figures['machine']['cpu']}, float32; {where}.", ""])


def _errors(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["| method | layer | outputs | gradients | files |", "|---|---|---|---|---|"]
    for row in rows:
        if "outputs" in row:
            lines.append(_line(row["method"], row["on"], row))
    return lines


def _line(method: str, on: str, row: Mapping[str, Any]) -> str:
    files = max(row["returned"], row["first"])
    cells = (method, on, number(row["outputs"]), number(row["gradients"]), f"yes, {number(files)}")
    return f"| {' | '.join(cells)} |"


def number(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _left_out(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is on one side alone, in words."""
    alone = {"lorica": [], "peft": [], "both": []}
    for row in rows:
        where = f"{row['method']} on {row['on']}"
        if row["peft"] and row["lorica"]:
            alone["both"] += [] if row["exchanged"] else [where]
        elif row["peft"] or row["lorica"]:
            alone["peft" if row["peft"] else "lorica"].append(where)
    told = {
        "both": "Both have it, but Lorica refuses the file by name and writes its own",
        "peft": "PEFT alone has it",
        "lorica": "Lorica alone has it",
    }
    return [f"- {told[key]}: {', '.join(alone[key]) or 'nothing'}." for key in told]


def _by_method(figures: Mapping[str, Any]) -> list[str]:
    """A line for each method: the worst over its architectures."""
    lines = ["| method | on | outputs | gradients | files |", "|---|---|---|---|---|"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in [*figures["prompts"], *figures["tokens"]]:
        groups.setdefault(row["method"], []).append(row)
    for method, rows in groups.items():
        keys = ("outputs", "gradients", "returned", "first")
        worst = {key: max(row[key] for row in rows) for key in keys}
        lines.append(_line(method, ", ".join(row["on"] for row in rows), worst))
    return lines


def _code(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Without what methods share: the protocol, the settings that choose layers, patterns."""
    lines = ["| file in `methods/` | words | lines | of them code |", "|---|---|---|---|"]
    for row in rows:
        words = ", ".join(row["words"])
        lines.append(f"| `{row['file']}` | {words} | {row['lines']} | {row['code']} |")
    return lines

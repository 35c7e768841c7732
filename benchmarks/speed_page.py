"""docs/speed.md from the figures in benchmarks/results/.

python benchmarks/speed_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs import RESULTS

PAGE = Path(__file__).parents[1] / "docs/speed.md"
SIDES = {
    "peft": "PEFT + Trainer, defaults",
    "peft-grouped": "PEFT + Trainer, length groups",
    "peft-packed": "PEFT, packed by hand",
    "peft-packed-compiled": "PEFT, packed, compiled",
    "peft-compiled": "PEFT, compiled",
    "lorica": "Lorica",
}
TITLES = {
    "llama30m-e2e": "Llama of 30 M on E2E records (about 50 tokens), rank 8, all linear layers",
    "llama30m-e2e-r4": "the same, rank 4",
    "llama30m-e2e-r64": "the same, rank 64",
    "llama30m-e2e-qv": "the same, rank 8 on q and v",
    "llama30m-1024": "the same base on records of 1,024 tokens, rank 8, all linear layers",
    "llama30m-shared": "the same base and records behind an instruction that all have in common, "
    "which Lorica computes once per batch, rank 8, all linear layers",
    "minilm-sst2": "MiniLM on SST-2, rank 8, all linear layers and the head",
    "stories260k-e2e": "the real small Llama (260 k) on E2E, rank 8, all linear layers",
}

HEAD = """# Speed

How fast training is, beside PEFT and beside what the machine can do. This page is written by
`python benchmarks/speed_page.py` from the files in `benchmarks/results/`; do not edit it by hand.

How it is done (`benchmarks/train_speed.py`):

- All sides of a workload are started and warmed up, then take a few optimizer steps in turn, round
  by round, so that whatever else the machine does falls on all alike. Shown are medians of real,
  not padded, tokens per second; compiling is not counted.
- *PEFT, packed* is a loop written by hand on the very batches of Lorica: documents in one row with
  attention kept apart, fused AdamW. *Compiled* adds `torch.compile` of each layer.
- *of the limit*: 4 floating-point operations per token and weight of the linear layers (2 forward,
  2 for the gradients of inputs) at the rate at which this machine multiplied 2048 x 2048 matrices
  between the rounds. Attention, the head's softmax and the adapter itself are not in it.
- Before that, PEFT trains from Lorica's start on Lorica's batches; a workload whose loss curves do
  not coincide in float32 ends with an error. In bfloat16 both curves are held against that one.
- In bfloat16 the base lies so in Lorica, which `dtype: auto` chooses where the processor multiplies
  it, and in every side of PEFT but the defaults, which stay float32: under autocast by hand, with
  `bf16=True` in the Trainer. Factors are float32 on every side.
"""

WHERE = """## Where the speed comes from

- Documents lie in one row without padding, each with attention of its own, and so do texts for a
  classifier. Only rows that carry a label, or that a classifier reads, go through the rest of the
  last layer behind its attention, and through the head.
- A plain dense layer and its LoRA products are one function: products with thin factors go with
  the long side in a row, and add into what the layer's own two products give.
- RMSNorm, gated feed-forward layers and rotary embeddings of the base are recognised by what they
  compute (`lorica.base.lean`), in any model of transformers, and run by functions that keep less;
  a part of such a form that computes something else is named in the run's output and left alone.
- Nothing of it changes results: float32 equals plain autograd within 1e-5 and repeats bit for bit;
  in bfloat16 the error against float64 is at most 1.5 times that of the plain path. Tests hold it.

What was tried and lost is in the [lab book](lab-book.md).
"""


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def described(found: dict[str, Any]) -> str:
    cpu = found["machine"]
    packages = ", ".join(f"{k} {found['versions'][k]}" for k in ("torch", "transformers", "peft"))
    return (
        f"{cpu['cpu']}, {cpu['cores']} cores, {cpu['num_threads']} threads used, load "
        f"{cpu['load_at_start']} at the start; {packages}"
    )


def section(title: str, text: str, found: dict[str, Any]) -> list[str]:
    """The beginning of a section: what was measured, and on what."""
    return [f"## {title}", "", text, "", f"{described(found)}.", ""]


def workload(found: dict[str, Any]) -> list[str]:
    losses = found["losses"]
    alike = (
        f"Over {losses['steps']} steps the loss curves of both differ by at most "
        f"{losses['largest_difference']:.0e} in float32"
    )
    if narrow := losses.get("in_bfloat16"):
        alike += (
            f"; in bfloat16 Lorica's is off by {narrow['lorica']:.0e}, that of PEFT under autocast "
            f"by {narrow['peft-same']:.0e}"
        )
    lines = [
        f"### {TITLES.get(found['workload'], found['workload'])}",
        "",
        f"Limit {found['limit_tokens_per_second']:,.0f} tokens/s at "
        f"{found['matrix_rate'] / 1e9:,.0f} GFLOP/s. {alike}. "
        f"{found['rounds']} rounds of {found['steps']} steps.",
        "",
        "| side | tokens/s | slowest to fastest | of the limit | peak memory | Lorica is |",
        "|---|---|---|---|---|---|",
    ]
    for side, row in found["sides"].items():
        times = "" if side == "lorica" else f"{row['lorica_is_times']:.2f} x"
        lines.append(
            f"| {SIDES[side]} | {row['tokens_per_second']:,.0f} | {row['slowest']:,.0f} to "
            f"{row['fastest']:,.0f} | {row['share_of_limit']:.0%} | "
            f"{row['memory_peak_bytes'] / 2**20:,.0f} MiB | {times} |"
        )
    return [*lines, ""]


def profile(found: dict[str, Any], dtype: str) -> list[str]:
    lines = section(
        f"Where a step's time goes, {dtype}",
        "`benchmarks/step_profile.py`: torch's profiler, one thread; milliseconds per thousand "
        "real tokens, so padding counts against the side that pads. *Python*: what no operation "
        "accounts for, the profiler's own work among it. Lorica's loss is made of plain sums and "
        "exponentials and counted with those.",
        found,
    )
    for name, sides in found["workloads"].items():
        kinds = dict.fromkeys(kind for one in sides.values() for kind in one)
        lines += [
            f"| {TITLES.get(name, name)} | {' | '.join(SIDES[side] for side in sides)} |",
            "|---|" + "---|" * len(sides),
        ]
        for kind in kinds:
            cells = (f"{one.get(kind, 0.0):,.0f}" for one in sides.values())
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        total = (f"{sum(one.values()):,.0f}" for one in sides.values())
        lines += [f"| together | {' | '.join(total)} |", ""]
    return lines


def growth(found: dict[str, Any]) -> list[str]:
    usual = ", ".join(f"{k} {v:,}" for k, v in found["usual"].items())
    lines = section(
        "How the cost grows",
        "`benchmarks/growth.py`: a Llama of random weights, changed along one axis at a time "
        f"({usual}). Seconds per step, and as a multiple of the first row; *operations*: the same "
        "multiple of the matrix products, attention included.",
        found,
    )
    for name, rows in found["axes"].items():
        keys = [k for k in found["usual"] if k in rows[0]]
        lines += [f"| {name} | s / step | times | operations |", "|---|---|---|---|"]
        for row in rows:
            label = ", ".join(f"{k} {row[k]:,}" for k in keys)
            lines.append(
                f"| {label} | {row['seconds']:.3f} | {row['times']:.1f} | "
                f"{row['operations_times']:.1f} |"
            )
        lines.append("")
    return lines


def startup(found: dict[str, Any]) -> list[str]:
    """Seconds of every part of a start, of the code before and now where both were measured."""
    lines = section(
        "Start-up",
        "`benchmarks/startup.py`: what `lorica train` does before its first step, for a Llama of "
        "30 M parameters and 8,000 records of E2E, beside importing torch and transformers. "
        "Seconds, medians; *processor*: of all cores together. *Before* and *now* took turns. "
        "The goal is 3 s on two cores.",
        found,
    )
    sides = {"before": "before", "after": "now"}
    sides = {key: word for key, word in sides.items() if key in found["phases"]}
    for kind in ("fresh", "cached"):
        heads = [f"{word}, {what}" for word in sides.values() for what in ("clock", "processor")]
        lines += [f"| {kind} records | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for phase in found["phases"]["after"][kind]:
            times = [found["phases"][side][kind][phase][i] for side in sides for i in (0, 1)]
            lines.append(f"| {phase} | {' | '.join(f'{time:.2f}' for time in times)} |")
        lines.append("")
    return lines


def page() -> str:
    """The text of docs/speed.md, from the figures that there are."""
    parts = [HEAD]
    for dtype in ("bfloat16", "float32"):
        if found := read(f"train_speed-{dtype}"):
            parts.append(f"## Training in {dtype}\n\n{described(found)}. Not measured on a GPU.\n")
            parts += ["\n".join(workload(one)) for one in found["workloads"]]
    for dtype in ("bfloat16", "float32"):
        if found := read(f"step_profile-{dtype}"):
            parts.append("\n".join(profile(found, dtype)))
    if found := read("growth"):
        parts.append("\n".join(growth(found)))
    if found := read("startup"):
        parts.append("\n".join(startup(found)))
    parts.append(WHERE)
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")

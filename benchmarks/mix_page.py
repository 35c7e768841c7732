"""docs/mix.md from benchmarks/results/mix.json.

python benchmarks/mix_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "mix.json"
PAGE = Path(__file__).parents[1] / "docs/mix.md"

HEAD = """# Mixing, merging, extracting

This page is written by `python benchmarks/mix_page.py` from `benchmarks/results/mix.json`; do not
edit it by hand.

## At run time

```python
lorica.activate(model, {"facts": 0.7, "style": -0.3})  # the exact sum of the updates
lorica.activate(model, [{"facts": 1.0}, {"style": 0.5}, None])  # one mixture per row of a batch
lorica.activate(model, {"style": {"layers.[0-7]": 0.5, "mlp": 0}})  # by block or layer; 1 elsewhere
lorica.activate(model, {"style": [1.0, 0.8, 0.5]})  # by step; the last one stays
lorica.activate(model, {"style": lambda step: 0.9**step})
```

A name or pattern takes a layer when it fits the layer's path or that of a block around it, and the
first that fits counts. A step is a forward pass: a token of a text, a step of a denoiser; a pass
with an empty cache begins again at 0, and so does `restart()` of what `activate` returns. A change
of weights changes a few numbers and no weight of the model.

## As one adapter

`lorica mix A B --weights 0.7 0.3 --output-dir DIR`, or `lorica.mix(model, {"a": 0.7, "b": 0.3})`.

| `--method` | what it makes | result |
|---|---|---|
| `cat` | the weighted sum of the updates, as stacked factors; the ranks add up | exact |
| `task_arithmetic` | the same; with `--r` cut to a rank | exact, or as `svd` |
| `svd` | the same sum, cut to rank `--r`: QR of the stacks, SVD of a small core | the nearest |
| `slerp` | the great circle between two updates, by the second weight | exact for that |
| `ties` | largest elements, elected signs, mean of those that agree | cut to `--r` |
| `dare_linear`, `dare_ties` | elements dropped by `--seed`, the rest made larger | cut to `--r` |
| `magnitude_prune` | largest elements of each, summed | cut to `--r` |
| `linear` | A and B summed apart, as in PEFT; warns with its error | not the sum |

Adapters may have different ranks, scales, layers and methods: whatever becomes a weight (LoRA,
DoRA, AdaLoRA, VeRA, LoHa, LoKr, HiRA) takes part, what is no product of thin factors with an
`--r`. Refused with the reason: virtual tokens, bottlenecks, edits of hidden states, rows of single
tokens, grouped convolutions, methods that change the bias too, and adapters of different bases.
New heads and other whole copies are mixed as `W + sum w_i (W_i - W)`. `--search DATA` looks for the
weights by the loss on a few records without gradients (LoraHub, arXiv 2307.13269).

One adapter alone: `lorica mix A --method svd --r 4` makes it smaller, or makes LoRA of LoHa, LoKr
or DoRA, and tells what is lost.

Where the names differ from PEFT's: there `ties`, `dare_linear`, `dare_ties` and `magnitude_prune`
prune the factors A and B apart; here they work on the updates, as in their papers and in mergekit,
which PEFT calls `ties_svd` and so on. Both names are taken here. `cat`, `svd`, `linear` and the
`_svd` ways give the logits of PEFT's `add_weighted_adapter` within 1e-5 (DARE with the same
elements dropped), and `cat` its very factors (`tests/parity/test_peft_mix.py`).
"""

MERGE = """## Into the base

`lorica merge` adds in float32 and rounds once, tells the damage of the rounding for every weight,
and refuses where it destroys a quarter of the adapter. Weights go from disk to disk, one at a time,
where the files name them as the model does (else the base is merged in memory, and that is said).
Embeddings that are tied to the head are untied where an adapter changes one of both. The new model
is asked what base and adapter were asked, and kept only where it answers the same; in Python,
`lorica.merge(...)` keeps what it replaces, and `report.undo()` puts back the very bits.

## Verified

`lorica verify ADAPTER MODEL [--prompts FILE]` compares any model, or another adapter, with base and
adapter: the share of the adapter's effect on the logits that is missing or wrong (0 for a copy, 1
where it was left out), and the greedy tokens. The limits are 1 % in float32, 10 % in float16, 25 %
in bfloat16 and int8; no token may differ whose lead is clear of errors within the limit. Exit code
3 refuses.

## Out of a full fine-tune

`lorica extract TUNED BASE --r 16 --output-dir DIR`, or `--energy 0.9` for the smallest rank of
every layer that holds so much of its squared change. Layers from 768 on are decomposed by a
randomised SVD. What is not held is told by layer and drawn in `spectra.html`; weights that changed
besides (norms, biases, embeddings) are named.
"""


def page() -> str:
    """The text of docs/mix.md, from the figures that there are."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts = [HEAD, *_errors(found), *_switch(found), *_pipelines(found), MERGE, *_spectra(found)]
    parts += _merge(found)
    text = "\n".join(part.rstrip("\n") + "\n" for part in parts)
    return text.rstrip() + "\n"


def _errors(found: dict[str, Any]) -> list[str]:
    if "errors" not in found:
        return []
    data = found["errors"]
    sides = {name: data[name] for name in ("apart", "alike")}
    ways = [*sides["apart"]["lorica"], *sides["apart"]["peft"]]
    lines = ["### How far every way is from the exact weighted sum", ""]
    lines += [
        f"Weights {data['weights']}, two adapters of rank {data['rank']}, density "
        f"{data['density']}, results cut to rank {data['rank']} where the way is cut. *Apart*: the "
        "adapters have starts of their own; *alike*: one start. Relative distance of the update, "
        "norm of Frobenius over all layers. Pruning ways are far from the sum on purpose.",
        "",
        "| way | Lorica, apart | PEFT, apart | Lorica, alike | PEFT, alike |",
        "|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(ways):
        cells = [
            _share(sides[c][s].get(way)) for c in ("apart", "alike") for s in ("lorica", "peft")
        ]
        lines.append(f"| `{way}` | {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0e}" if value < 1e-4 else f"{value:.1%}"


def _switch(found: dict[str, Any]) -> list[str]:
    if "switch" not in found:
        return []
    lines = [
        "### Many adapters at once",
        "",
        "A Llama of two layers with so many LoRA adapters of rank 4 on q and v. Times of the "
        "processor on a machine that was busy with other things, the least of 15; loading is the "
        "sum over all adapters, with PEFT's first wrapping of the model.",
        "",
        "| resident | side | load all | switch | change two weights | forward pass |",
        "|---|---|---|---|---|---|",
    ]
    return ["\n".join([*lines, *_rows(found["switch"])]) + "\n"]


SIDES = {"lorica": "Lorica", "peft": "PEFT", "diffusers": "diffusers"}


def _rows(sides: dict[str, Any]) -> list[str]:
    """Each number of adapters, side by side."""
    lines = []
    for count in dict.fromkeys(count for side in sides.values() for count in side):
        for side, rows in sides.items():
            if count in rows:
                lines.append(f"| {int(count):,} | {SIDES[side]} | {_times(rows[count])} |")
    return lines


def _times(row: dict[str, Any]) -> str:
    if "stopped_at" in row:
        return (
            f"stopped after {row['after_s']:.0f} s, the limit, with {row['stopped_at']} loaded | "
            "– | – | –"
        )
    times = (f"{row[key]:.2f} ms" for key in ("switch_ms", "change_weights_ms", "forward_ms"))
    return f"{row['load_all_s']:.2f} s | {' | '.join(times)}"


def _pipelines(found: dict[str, Any]) -> list[str]:
    parts = []
    for kind, title in (("sd", "Stable Diffusion"), ("sdxl", "SDXL")):
        if kind in found.get("pipelines", {}):
            lines = [
                f"### Many image adapters at once: {title}",
                "",
                "A tiny pipeline with random weights and so many LoRA adapters of rank 4 on the "
                "attention of its denoiser, beside `load_lora_weights` and `set_adapters` of "
                "diffusers; a forward pass is one of the denoiser. Times as above; a side that "
                "is not shown was not run to its end.",
                "",
                "| resident | side | load all | switch | change two weights | forward pass |",
                "|---|---|---|---|---|---|",
            ]
            parts.append("\n".join([*lines, *_rows(found["pipelines"][kind])]) + "\n")
    return parts


def _spectra(found: dict[str, Any]) -> list[str]:
    if "spectra" not in found:
        return []
    data = found["spectra"]
    return [
        "![singular values of the change of every layer](images/spectra.svg)\n\n"
        f"All weights of the demo's base, trained for {data['steps']} steps on its facts: the "
        "singular values of what changed, each line a layer, over the norm of its change. For 90 % "
        f"of the squared change the layers take ranks from {data['lowest_rank']} to "
        f"{data['highest_rank']}. (`python benchmarks/mix.py spectra`)\n"
    ]


def _merge(found: dict[str, Any]) -> list[str]:
    if "merge" not in found:
        return []
    size, sides = found["merge"]["bytes"], found["merge"]["sides"]
    lines = [
        f"### A base of {size / 1e9:.2g} GB",
        "",
        f"A Llama of {size / 1e9:.2f} GB in float32, in files of at most 64 MB, LoRA of rank 16 on "
        "all linear layers, written as a new folder; a process each. Memory is the peak beside "
        "what the imports take.",
        "",
        "| way | processor time | peak memory | of the model |",
        "|---|---|---|---|",
    ]
    for side, runs in sides.items():
        seconds, peak = (min(run[key] for run in runs) for key in ("seconds", "peak"))
        lines.append(f"| {side} | {seconds:.1f} s | {peak / 1e9:.2f} GB | {peak / size:.2f} |")
    return ["\n".join(lines) + "\n"]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")

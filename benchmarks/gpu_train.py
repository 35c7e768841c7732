"""LoRA training on a GPU: Lorica, PEFT at its defaults, PEFT tuned by hand, Liger, and the limit.

    python benchmarks/gpu_train.py                       # both shapes, every side
    python benchmarks/gpu_train.py llama-1b --sides lorica peft-tuned --no-context
    python benchmarks/gpu_train.py --tiny                # a dry run in a minute, on any CPU

Llama shapes of 1 and 8 billion parameters with random weights, bfloat16, rank 16 on all linear
layers, records of mixed lengths. Every side is a process of its own, so that its memory is its own.
Printed are medians over rounds of real (not padded) tokens per second with their spread; the share
of the limit, 4 N operations per token (2 forward, 2 for the gradients of inputs; N: parameters of
the linear layers, the head among them) at the rate of matrix products measured between the rounds;
the peak memory; and the longest document of which one step, with layers recomputed, fits.

The sides of a shape start from the same weights, and those that pack take the same batches: the
losses of their first steps must agree.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gpu_sides import NEEDS, SIDES, Job
from jobs import machine, versions, write_result

HERE = Path(__file__).resolve().parent
LONGEST = 2**20
SHAPES = {
    "llama-1b": {  # Llama 3.2
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {  # Llama 3.1
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def lengths(number: int, *, median: int, most: int) -> list[int]:
    """Tokens per record: log-normal, as instruction data has them, between 16 and `most`."""
    drawn = np.random.default_rng(0).lognormal(math.log(median), 0.8, number)
    return drawn.clip(16, most).astype(int).tolist()


def linear_parameters(shape: dict) -> int:
    """N: what every token is multiplied with; the head counts, tied or not, the embedding not."""
    d, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, few = shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = 2 * d * d + 2 * d * d * few // heads
    return shape["num_hidden_layers"] * (attention + 3 * d * inner) + d * shape["vocab_size"]


def job_of(shape: dict, options: argparse.Namespace) -> Job:
    shape = shape | {"max_position_embeddings": LONGEST, "bos_token_id": 1, "eos_token_id": 2}
    if options.tiny:
        records = lengths(24, median=24, most=60)
        return Job(shape, "cpu", records, 4, 1, 2, 2, 4, 256, 128)
    records = lengths(2000, median=400, most=2048)
    repeats = (options.warmup, options.rounds, options.steps)
    return Job(shape, "cuda", records, options.batch_size, *repeats, 16, 8192, LONGEST)


def run(side: str, what: str, job: Job, folder: Path) -> dict:
    """The answer of a side; or why there is none."""
    if (package := NEEDS.get(side)) is not None and find_spec(package) is None:
        return {"none": f"{package} is not installed"}
    if package is not None and job.device == "cpu":
        return {"none": f"{package} needs a GPU"}
    path, log = folder / "job.json", folder / f"{side}-{what}.log"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as errors:
        command = [sys.executable, str(HERE / "gpu_sides.py"), side, what, str(path)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
    if done.returncode or not done.stdout.strip():
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        if "OutOfMemoryError" in said:
            return {"none": "out of memory"}
        raise SystemExit(f"{side} ({what}) failed with {done.returncode}:\n{said[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(found: dict, linear: int) -> dict:
    """The medians of one side."""
    if "none" in found:
        return found
    speeds = [one["tokens"] / one["seconds"] for one in found["rounds"]]
    shares = [
        speed * 4 * linear / one["rate"] for speed, one in zip(speeds, found["rounds"], strict=True)
    ]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "share_of_limit": statistics.median(shares),
        "matrix_rate": statistics.median(one["rate"] for one in found["rounds"]),
        **{k: v for k, v in found.items() if k != "rounds"},
    }


def measure(name: str, shape: dict, options: argparse.Namespace) -> dict:
    """One shape: every side in turn."""
    job, linear, rows = job_of(shape, options), linear_parameters(shape), {}
    with tempfile.TemporaryDirectory() as temporary:
        for side in options.sides:
            rows[side] = row_of(run(side, "speed", job, Path(temporary)), linear)
            if options.context and rows[side].get("none") in (None, "out of memory"):
                rows[side] |= run(side, "context", job, Path(temporary))
            show_row(side, rows[side])
    check_losses(rows)
    return {
        "shape": name,
        "settings": shape | {"r": job.r, "batch_size": job.batch_size},
        "mean_length": statistics.mean(job.lengths),
        "linear_parameters": linear,
        "sides": rows,
    }


def check_losses(rows: dict[str, dict]) -> None:
    """Sides that take the same first batch have the same first loss, up to bfloat16's rounding."""
    first = {side: row["first_loss"] for side, row in rows.items() if row.get("first_loss")}
    if first and max(first.values()) - min(first.values()) > 0.02 * min(first.values()):
        raise SystemExit(f"this is no comparison, the first losses differ: {first}")


def show_row(side: str, row: dict) -> None:
    if "none" in row:
        print(f"{side:22}{row['none']}", flush=True)
        return
    spread = f"{row['slowest']:,.0f}..{row['fastest']:,.0f}"
    end = f"{row['longest_context']:>12,}" if "longest_context" in row else ""
    print(
        f"{side:22}{row['tokens_per_second']:>10,.0f}{spread:>18}{row['share_of_limit']:>9.1%}"
        f"{row['peak_bytes'] / 2**30:>10.2f}{end}  {'; '.join(row['notes'])}",
        flush=True,
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all where none")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="all where none is named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps per round")
    parser.add_argument("--warmup", type=int, default=5, help="steps that do not count")
    parser.add_argument("--batch-size", type=int, default=16, help="records per step")
    parser.add_argument("--context", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="a dry run of a tiny shape on the CPU")
    parser.add_argument("--name", default="gpu_train", help="name of the result")
    options = parser.parse_args(arguments)
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    compiling = {"peft-tuned-compiled"} if options.tiny else set()  # takes minutes on a CPU
    options.sides = options.sides or [side for side in SIDES if side not in compiling]
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny is a dry run on the CPU")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    shapes = {"tiny": TINY} if options.tiny else {n: SHAPES[n] for n in options.shapes or SHAPES}
    device = "CPU: a dry run, no measurement" if options.tiny else torch.cuda.get_device_name()
    result = {
        "machine": machine(torch.get_num_threads()) | {"device": device},
        "versions": versions(),
        "shapes": [],
    }
    for name, shape in shapes.items():
        print(f"\n{name} on {device}")
        print(f"{'side':22}{'tokens/s':>10}{'spread':>18}{'of limit':>9}{'peak GiB':>10}  context")
        result["shapes"].append(measure(name, shape, options))
    if options.tiny:
        print("a dry run: nothing is written")
    else:
        write_result(options.name, result)


if __name__ == "__main__":
    main()

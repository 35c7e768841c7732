"""Where the time of a training step goes, operation by operation: PEFT's ways beside Lorica.

    python benchmarks/step_profile.py                   # the 30 M shape on records of E2E
    python benchmarks/step_profile.py minilm-sst2

The sides are those of train_speed.py, each in a process of its own with one thread, in turn. The
profiler of torch counts the time that an operation spends itself; operations are summed by kind,
and what is left of the wall time is Python, autograd's own work and the gaps between operations.
Shown are milliseconds per thousand real tokens, so padding counts against the side that pads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from jobs import machine, versions, write_result
from train_speed import Side, faster_dtype, prepare, workloads

SIDES = {"peft", "peft-grouped", "peft-packed", "lorica"}


def measure(name: str, options) -> dict:
    how = workloads(options.data)[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(name, how, options.data, folder, options)
        sides = [Side(side, folder, 1) for side in how["sides"] if side in SIDES]
        for side in sides:
            side.steps(options.warmup)
        found = {side.name: side.steps(options.steps, profiled=True) for side in sides}
        for side in sides:
            side.end()
    return {side: per_thousand_tokens(one) for side, one in found.items()}


def per_thousand_tokens(found: dict) -> dict:
    """Milliseconds by kind; `python` is what no operation accounts for."""
    kinds = dict(found["kinds"])
    kinds["python"] = max(0.0, found["seconds"] - sum(kinds.values()))
    scale = 1e6 / found["tokens"]
    return {kind: seconds * scale for kind, seconds in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(__file__).resolve().parents[2] / "shared/data"
    parser.add_argument("workloads", nargs="*", default=["llama30m-e2e"])
    parser.add_argument("--data", type=Path, default=shared, help="folder of the data sets")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps that count")
    parser.add_argument("--warmup", type=int, default=4, help="steps that do not count")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what is faster here")
    options = parser.parse_args()
    options.num_threads = 1
    torch.set_num_threads(1)
    options.dtype = options.dtype or faster_dtype()
    result = {"machine": machine(1), "versions": versions(), "dtype": options.dtype}
    result["workloads"] = {}
    for name in options.workloads:
        result["workloads"][name] = sides = measure(name, options)
        kinds = dict.fromkeys(kind for one in sides.values() for kind in one)
        print(f"\n{name}, ms per 1,000 tokens\n{'':30}" + "".join(f"{s:>14}" for s in sides))
        for kind in kinds:
            row = "".join(f"{one.get(kind, 0.0):>14,.1f}" for one in sides.values())
            print(f"{kind:30}{row}")
        print(f"{'together':30}" + "".join(f"{sum(s.values()):>14,.1f}" for s in sides.values()))
    write_result(f"step_profile-{options.dtype}", result)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

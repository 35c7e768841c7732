"""Single operations beside their plain forms: time and memory of forward and backward pass.

    python benchmarks/ops.py                          # all rows (minutes), results/ops.json
    python benchmarks/ops.py loss-small optimizer-r8  # these rows; figures of the others stay
    python benchmarks/ops.py --threads 2 --repeats 9

Every row has candidates that compute the same. They take turns, so that a busy machine is busy for
all of them, and each is given the median of its times. Peak memory is what torch allocates at once
in one more call, beyond what was there before.

A row is a function that makes the candidates; add one to `ROWS` for another operation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import torch  # noqa: E402
from jobs import RESULTS, machine, versions, write_result  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from lorica.config import TrainSettings  # noqa: E402
from lorica.ops.cross_entropy import linear_cross_entropy, rows_of_a_piece  # noqa: E402
from lorica.train.optim import make_optimizer  # noqa: E402


@dataclass
class Row:
    """Candidates by name; `facts` are the sizes, `floor` does what no form can leave out."""

    candidates: dict[str, Callable[[], Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    floor: Callable[[], Any] | None = None


def loss(T: int, V: int, D: int, dtype: torch.dtype = torch.float32) -> Row:
    """The loss of T labelled rows under a frozen head, and its gradient by the hidden states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=generator)
    detached = hidden.detach()

    def run(value: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = None
            (value() / T).backward()

        return call

    def torch_form() -> torch.Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum")

    def plain() -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

    forms = {
        "F.cross_entropy(head(h))": run(plain),
        "F.linear_cross_entropy": run(torch_form),
        "lorica": run(lambda: linear_cross_entropy(hidden, weight, targets).sum()),
    }
    facts = {"rows": T, "vocabulary": V, "features": D, "dtype": str(dtype).split(".")[1]}
    facts["rows_of_a_piece"] = min(T, rows_of_a_piece(weight))
    return Row(forms, facts, lambda: (detached @ weight.t()) @ weight)


def optimizer(r: int, layers: int = 8, width: int = 512, inner: int = 1408) -> Row:
    """Clipping and a step of AdamW over LoRA on all linear layers of a Llama."""
    sizes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    shapes = [s for i, o in sizes * layers for s in ((r, i), (o, r))]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=generator) for s in shapes]
    forms: dict[str, Callable[[], Any]] = {}
    for name in ("fused", "foreach", "single", "adamw_8bit"):
        parameters = [torch.nn.Parameter(t.clone()) for t in starts]
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        named = [(f"x{i}.A", p) for i, p in enumerate(parameters)]
        if name in ("fused", "adamw_8bit"):
            kind = "adamw" if name == "fused" else name
            made = make_optimizer(named, TrainSettings(optim=kind))
        else:
            made = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0, foreach=name == "foreach")
        forms[name] = made.step
    parameters = [torch.nn.Parameter(t) for t in starts]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-5)
    forms["clip_grad_norm_, below the limit"] = lambda: torch.nn.utils.clip_grad_norm_(
        parameters, 1.0
    )
    forms["norm alone"] = lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters])
    return Row(forms, {"tensors": len(shapes), "numbers": sum(t.numel() for t in starts)})


ROWS: dict[str, Callable[[], Row]] = {
    "loss-small": lambda: loss(350, 8192, 512),
    "loss-middle": lambda: loss(1024, 32_000, 768),
    "loss-large": lambda: loss(2048, 32_000, 2048),
    "optimizer-r8": lambda: optimizer(8),
    "optimizer-r64": lambda: optimizer(64),
}


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most that torch allocates at once in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def measure(row: Row, repeats: int) -> dict[str, Any]:
    calls = dict(row.candidates) | ({"floor": row.floor} if row.floor else {})
    for call in calls.values():  # a first call warms up
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    found = {
        name: {
            "milliseconds": round(1e3 * statistics.median(times[name]), 3),
            "fastest": round(1e3 * min(times[name]), 3),
            "peak_bytes": peak_bytes(call),
        }
        for name, call in calls.items()
    }
    return {**row.facts, "repeats": repeats, "candidates": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="rows; none: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    before = RESULTS / "ops.json"
    found = json.loads(before.read_text(encoding="utf-8"))["rows"] if before.exists() else {}
    for name in given.rows or ROWS:
        found[name] = measure(ROWS[name](), given.repeats) | {"num_threads": given.threads}
        print(name, {k: v for k, v in found[name].items() if k != "candidates"})
        for candidate, figures in found[name]["candidates"].items():
            size = figures["peak_bytes"] / 2**20
            times = f"{figures['milliseconds']:10.2f} ms (fastest {figures['fastest']:10.2f})"
            print(f"  {candidate:34} {times} {size:9.1f} MiB", flush=True)
    result = {"machine": machine(given.threads), "versions": versions(), "rows": found}
    write_result("ops", result)


if __name__ == "__main__":
    main()

"""Every figure of docs/reliability.md, from one command that anyone can run again.

    python benchmarks/reliability.py                     # everything, about half an hour
    python benchmarks/reliability.py --only kills space  # parts; the other figures stay
    python benchmarks/reliability.py --scale 0.05        # a look, in minutes; nothing is kept
    python benchmarks/reliability.py --page              # only the page, from the figures there are

Needs the development installation and Linux; a part that needs more (to mount a small disk) says
so in its figures. Writes benchmarks/results/reliability.json and docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import killing
import torch
from reliability_page import PAGE, page

from faults import operations, powerloss, scenarios
from faults.injection import Found, crash_again_and_again, sweep
from faults.scenarios import QUICK, Counted, Rig
from lorica.records.atomic import write_file
from lorica.train import checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/reliability.json"
Figures = dict[str, Any]


class Amount:
    """How often things are tried: the numbers of the table, times the scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, full: int, least: int = 1) -> int:
        return max(least, math.ceil(full * self.scale))


def place() -> Path:
    """An empty folder for one part."""
    return Path(tempfile.mkdtemp(prefix="lorica-reliability-"))


def plain(found: Counted) -> Figures:
    """The figures of a scenario, with the first of what was wrong."""
    return {
        "cases": found.cases,
        "violations": len(found.violations),
        **found.figures,
        **({"first violations": found.violations[:5]} if found.violations else {}),
    }


def together(*parts: Found) -> Figures:
    """The figures of several operations under injected faults."""
    return {
        "cases": sum(part.cases for part in parts),
        "violations": sum(len(part.violations) for part in parts),
        "by operation": {
            part.operation: {
                "calls": part.calls,
                "cases": part.cases,
                "violations": len(part.violations),
            }
            for part in parts
        },
        **(
            {"first violations": [v for part in parts for v in part.violations][:5]}
            if any(part.violations for part in parts)
            else {}
        ),
    }


# --- the parts ------------------------------------------------------------------------------------


def kills(amount: Amount) -> Figures:
    """F-01: kill -9 at random moments, and the same for a writer without care."""
    return {
        "runs": killing.kill_runs(place(), amount(200)),
        "dense": killing.kill_saves(place(), amount(60), naive=False),
        "dense, naive writer": killing.kill_saves(place(), amount(60), naive=True),
    }


def injections(amount: Amount) -> Figures:
    """F-02, F-30: every call that changes the disk times every kind of fault."""
    chosen = operations.OPERATIONS if amount.scale >= 1 else operations.OPERATIONS[:2]
    return together(*(sweep(operation, place()) for operation in chosen))


def stacked(amount: Amount) -> Figures:
    """F-04: crashes in recovery, and five in a row at the same call."""
    chosen = (operations.SAVE, operations.RECOVER, operations.STACKED)
    if amount.scale < 1:
        chosen = chosen[1:2]
    return together(*(crash_again_and_again(operation, place()) for operation in chosen))


def power(amount: Amount) -> Figures:
    """F-03: every prefix of the logged calls, with what was not synced lost in every way."""
    found: Figures = {"states": 0, "violations": 0, "by operation": {}}
    for operation, judge in operations.LOSSES:
        folder = place()
        root = folder / "root"
        root.mkdir()
        operation.prepare(root)
        with powerloss.logged(root) as log:
            operation.work(root)
        states, wrong = powerloss.violations(log, folder, judge)
        caught = [
            bool(powerloss.violations(log, folder, judge, without_sync=number, first_only=True)[1])
            for number in range(log.num_syncs())
        ]
        found["states"] += states
        found["violations"] += len(wrong)
        found["by operation"][operation.name] = {
            "calls": len(log.steps),
            "states": states,
            "violations": len(wrong),
            "fsyncs": log.num_syncs(),
            "fsyncs whose removal is noticed": sum(caught),
        }
    return found


def space(amount: Amount) -> Figures:
    """F-05: disks of 20 sizes, from nothing to enough."""
    own = Rig(place(), dict(QUICK))
    number = amount(20, 2)
    limits = scenarios.short_files(own, [round(80_000 * i / number) for i in range(number)])
    try:
        sizes = [round(520_000 * i / number) for i in range(number)]
        disks = plain(scenarios.full_disk(own, sizes))
    except Exception as error:
        disks = {"not run": f"this user may not mount: {error}"}
    return {"disks": disks, "file size limits": plain(limits)}


def damage(amount: Amount) -> Figures:
    """F-08: every file of three checkpoints, damaged in seven ways."""
    return plain(
        scenarios.damage(
            place(),
            lambda folder, step: checkpoint.save(folder, operations.state(step), keep=3),
            lambda folder: checkpoint.load(folder, operations.IDENTITY),
        )
    )


def numbers(amount: Amount) -> Figures:
    """F-10, F-11: NaN and infinity in four places, 40 seeds each."""
    return plain(scenarios.not_finite(place(), amount(40)))


def memory(amount: Amount) -> Figures:
    """F-13, F-14: an allocation that fails at every operation of a step; capped address space."""
    every = 1 if amount.scale >= 1 else 100
    own = Rig(place(), {**QUICK, "batch_size": 48, "r": 64})
    shares = [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9] if amount.scale >= 1 else [0.05, 0.6]
    return {
        "allocations": plain(scenarios.failing_allocations(place(), every=every)),
        "caps": plain(scenarios.capped_memory(own, shares)),
    }


def interrupts(amount: Amount) -> Figures:
    """F-16: three signals in every phase, two at once, and at random moments."""
    own = Rig(place(), dict(QUICK))
    phases = list(scenarios.PHASES)
    return {
        "by phase": plain(scenarios.interrupts_by_phase(own, phases, [2, 15, 1][: amount(3)])),
        "twice": plain(scenarios.interrupts_by_phase(own, phases, [15], times=2)),
        "at random": plain(scenarios.interrupts_at_random(own, amount(148))),
    }


def others(amount: Amount) -> Figures:
    """F-21, F-25, F-29: several starters, a process that is stopped, a base that is overwritten."""
    own = Rig(place(), dict(QUICK))
    return {
        "four starters": plain(scenarios.starters(place(), amount(100))),
        "stopped and continued": plain(scenarios.pauses(own, 20)),
        "base overwritten": plain(scenarios.replaced_base(own, amount(50))),
    }


PARTS: dict[str, Callable[[Amount], Figures]] = {
    part.__name__: part
    for part in (
        kills, injections, stacked, power, space, damage, numbers, memory, interrupts, others,
    )
}  # fmt: skip


def machine() -> Figures:
    return {
        "system": platform.platform(terse=True),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="share of the numbers of trials")
    parser.add_argument("--page", action="store_true", help="write the page and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in given.only if not given.page else ():
        began = time.monotonic()
        print(f"{name}: {(PARTS[name].__doc__ or '').strip()}", flush=True)
        figures = PARTS[name](Amount(given.scale))
        figures["seconds"] = round(time.monotonic() - began)
        print(json.dumps(figures, indent=1), flush=True)
        if given.scale == 1.0:
            figures["machine"] = machine()
            figures["date"] = time.strftime("%Y-%m-%d", time.gmtime())
            _keep(name, figures)
    PAGE.write_text(page(), encoding="utf-8")


def _known() -> Figures:
    return json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}


def _keep(name: str, figures: Figures) -> None:
    """Put the figures of one part beside those of the others, whoever measured these."""
    RESULTS.parent.mkdir(exist_ok=True)
    known = {**_known(), name: figures}
    write_file(RESULTS, json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

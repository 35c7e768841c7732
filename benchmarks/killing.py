"""kill -9 at random moments of real training runs, and the same for a writer that takes no care.

A trial is a command line that is started, killed after a random time, and started again, until it
ends by itself. What is looked at after every kill is read by code that shares nothing with the
code under test.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import safetensors.torch

from faults import rig
from lorica.train import checkpoint

DENSE = {"r": 64, "lora_alpha": 64, "save_steps": 1}
"""Large checkpoints after every step: where a kill meets a save often."""


@dataclass
class Tally:
    """What was counted over all trials; `faults` tells what was wrong, trial by trial."""

    trials: int = 0
    kills: int = 0
    kills_before_first_checkpoint: int = 0
    torn: int = 0
    manual_steps: int = 0
    lost_more_than_an_interval: int = 0
    most_steps_lost: int = 0
    same_adapter: int = 0
    same_rows: int = 0
    leftovers: int = 0
    faults: list[str] = field(default_factory=list)


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the machine decide."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "memory_bytes")}
            for r in found]  # fmt: skip


def resumptions(folder: Path) -> list[dict]:
    try:
        return json.loads((folder / "run.json").read_bytes()).get("resumed", [])
    except (OSError, ValueError):
        return []


def kill_runs(
    place: Path, kills: int, *, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Kill so many times, over as many runs as that takes, and let each come to its end.

    Returns:
        the tally as plain values, with the length of an uninterrupted run in seconds.
    """
    stock = rig.write_rig(place)
    rig.warm(stock, place / "warm")
    began = time.monotonic()
    assert rig.finished(rig.command(stock, place / "whole"), place / "whole.txt").code == 0
    seconds = time.monotonic() - began
    wanted = rig.digest(place / "whole"), rows(place / "whole")
    tally = Tally()
    number = 0
    while tally.kills < kills and len(tally.faults) < 10:
        trial(place, stock, random.Random(f"{seed}/{number}"), seconds, wanted, tally, number)
        number += 1
        if number % 10 == 0:
            say(f"  {number} runs, {tally.kills} of {kills} kills, {len(tally.faults)} faults")
    return {**vars(tally), "seconds_of_a_run": round(seconds, 2), "steps": rig.STEPS,
            "save_steps": rig.SAVE_STEPS}  # fmt: skip


def trial(
    place: Path,
    stock: Path,
    rng: random.Random,
    seconds: float,
    wanted: tuple[str, list[dict]],
    tally: Tally,
    number: int,
) -> None:
    """One run, killed once and by chance more often, up to its end."""
    folder, output = place / f"run-{number}", place / "words.txt"
    words = rig.command(stock, folder)
    tally.trials += 1
    ended, logged, told = False, 0, 0
    for attempt in range(100):
        run = rig.start(words, output)
        if attempt == 0 or rng.random() < 0.4:
            time.sleep(rng.uniform(0, seconds))
            run.send(signal.SIGKILL)
        code = run.wait()
        found = resumptions(folder)
        if len(found) > told:  # this attempt went on from somewhere
            lost = logged - found[-1]["step"]
            tally.most_steps_lost = max(tally.most_steps_lost, lost)
            tally.lost_more_than_an_interval += lost > rig.SAVE_STEPS
            told = len(found)
        logged = rig.last_logged(folder)
        if code == 0:
            ended = True
            break
        if code != -signal.SIGKILL:
            tally.manual_steps += 1
            tally.faults.append(f"run {number}: exit {code}: {run.words[-400:]}")
            break
        tally.kills += 1
        named = rig.names_of_steps(folder)
        tally.kills_before_first_checkpoint += not named
        if named != rig.whole_steps(folder):
            tally.torn += 1
            tally.faults.append(f"run {number}: of {named} whole are {rig.whole_steps(folder)}")
    if ended:
        same = rig.digest(folder) == wanted[0], rows(folder) == wanted[1]
        tally.same_adapter += same[0]
        tally.same_rows += same[1]
        tally.leftovers += len(rig.leftovers(folder))
        if not all(same) or rig.leftovers(folder):
            tally.faults.append(f"run {number}: same {same}, left {rig.leftovers(folder)}")
    _remove(folder)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


# --- the control ----------------------------------------------------------------------------------


def naive_save(folder: Path, state: checkpoint.State, *, keep: int = 2) -> Path:
    """What much software does: straight into the folder, under its final name."""
    target = folder / f"step-{state.step:08d}"
    target.mkdir(parents=True)
    for group in ("adapters", "optimizers", "best"):
        for name, tensors in getattr(state, group).items():
            plain = {key: t.detach().contiguous() for key, t in tensors.items()}
            safetensors.torch.save_file(plain, target / f"{group}-{name}.safetensors")
    (target / "state.json").write_text(json.dumps(state.counters))
    return target


def naive_is_torn(folder: Path) -> bool:
    """Whether what that writer's reader would choose, the highest number, cannot be read."""
    newest = max((folder / "checkpoints").glob("step-*"), default=None)
    if newest is None:
        return False
    try:
        json.loads((newest / "state.json").read_text())
        for group in ("adapters", "optimizers"):
            safetensors.torch.load_file(newest / f"{group}-default.safetensors")
    except Exception:
        return True
    return False


def careful_is_torn(folder: Path) -> bool:
    return rig.names_of_steps(folder)[:1] != rig.whole_steps(folder)[:1]


def kill_saves(place: Path, kills: int, *, naive: bool, seed: int = 0) -> Mapping[str, Any]:
    """Kill runs that save after every step, and count after how many the newest is torn."""
    stock = rig.write_rig(place)
    rig.warm(stock, place / "warm")

    def trap() -> None:
        if naive:
            checkpoint.save = naive_save

    words = rig.command(stock, place / "whole", **DENSE)
    began = time.monotonic()
    assert rig.finished(words, place / "words.txt", before=trap).code == 0
    seconds = time.monotonic() - began
    rng, torn, met = random.Random(f"dense/{seed}"), 0, 0
    for number in range(kills):
        folder = place / f"run-{number}"
        run = rig.start(rig.command(stock, folder, **DENSE), place / "words.txt", before=trap)
        time.sleep(rng.uniform(0, seconds))
        run.send(signal.SIGKILL)
        if run.wait() == -signal.SIGKILL:
            met += 1
            torn += naive_is_torn(folder) if naive else careful_is_torn(folder)
        _remove(folder)
    return {"kills": met, "torn": torn, "share": round(torn / max(1, met), 3)}

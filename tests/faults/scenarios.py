"""Faults of whole runs: each function tries one kind so many times and returns what was wrong.

The tests call them with small numbers, `benchmarks/reliability.py` with those of its table.
"""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from faults import rig
from lorica.cli import forecast
from lorica.cli import prepare as preparing
from lorica.cli import run as running
from lorica.config import TrainSettings
from lorica.errors import LoricaError, NonFiniteError, OutOfMemory, RunLocked
from lorica.records import report
from lorica.records.folder import RunFolder
from lorica.records.write import RunRecorder
from lorica.tasks.causal_lm import CausalLM
from lorica.train import checkpoint, engine, evaluations, loop
from lorica.train.engine import Engine
from train.runs import model_with
from train.words import WordTokenizer, examples


@dataclass
class Counted:
    """How many cases were tried, what was wrong in which, and figures beside."""

    cases: int = 0
    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, right: bool, what: str) -> None:
        """Count a violation where something is not right."""
        if not right:
            self.violations.append(what)


@dataclass
class Rig:
    """The rig of one scenario: where it lies, and what an undisturbed run gives.

    Attributes:
        changes: flags that differ from `rig.FLAGS`.
    """

    place: Path
    changes: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    wanted: str = ""
    _number: int = 0

    def __post_init__(self) -> None:
        rig.write_rig(self.place)
        rig.warm(self.place, self.place / "warm")
        began = time.monotonic()
        run = rig.finished(self.words(whole := self.place / "whole"), self.output)
        assert run.code == 0, run.words
        self.seconds = time.monotonic() - began
        self.wanted = rig.digest(whole)

    @property
    def output(self) -> Path:
        return self.place / "words.txt"

    def words(self, folder: Path, **changes: object) -> list[str]:
        return rig.command(self.place, folder, **{**self.changes, **changes})

    def folder(self) -> Path:
        self._number += 1
        return self.place / f"run-{self._number}"

    def goes_on(self, folder: Path, **changes: object) -> str | None:
        """Start the command again; what is wrong with what it gives."""
        run = rig.finished(self.words(folder, **changes), self.output)
        if run.code != 0:
            return f"started again it ended with {run.code}: {run.words[-500:]}"
        if rig.digest(folder) != self.wanted:
            return "another adapter than that of an undisturbed run"
        left = [name for name in rig.leftovers(folder) if not name.startswith(".bad-")]
        return f"left behind: {left}" if left else None


QUICK = {"max_steps": 12, "eval_steps": 6, "save_steps": 3}
"""A shorter run, for the tests of the suite."""


# --- F-16: signals --------------------------------------------------------------------------------


def _at(place: Any, name: str, send: Callable[[], None], *, when=lambda *arguments: True) -> None:
    """Send a signal when a function is about to be called for the first time."""
    real, sent = getattr(place, name), []

    def call(*arguments, **named):
        if not sent and when(*arguments):
            sent.append(True)
            send()
        return real(*arguments, **named)

    setattr(place, name, call)


PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "loading": lambda send: _at(preparing, "load_model", send),
    "tokenising": lambda send: _at(forecast, "encode", send),
    "beginning": lambda send: _at(running, "_begin", send),
    "scoring the base": lambda send: _at(running, "predictions", send),
    "generating": lambda send: _at(CausalLM, "predict", send),
    "warm-up": lambda send: _at(Engine, "step", send, when=lambda self, t, w: t[0].step == 0),
    "step": lambda send: _at(Engine, "step", send, when=lambda self, t, w: t[0].step == 7),
    "evaluation": lambda send: _at(evaluations, "mean_loss", send),
    "save": lambda send: _at(checkpoint, "_write", send),
    "prune": lambda send: _at(checkpoint, "_prune", send),
    "publishing": lambda send: _at(loop, "save_adapter", send),
    "scoring the tuned": lambda send: _at(
        running, "predictions", send, when=lambda model, adapter, *rest: adapter is not None
    ),
    "report": lambda send: _at(report, "write_report", send),
}
"""Phase of a run -> lays the trap that sends the signal in it."""


def interrupts_by_phase(own: Rig, phases: list[str], numbers: list[int], times: int = 1) -> Counted:
    """Signals `numbers` in each phase, `times` at once; then the same command again."""
    found = Counted()
    for phase in phases:
        for number in numbers:
            found.cases += 1
            folder = own.folder()

            def trap(phase: str = phase, number: int = number) -> None:
                def send() -> None:
                    for _ in range(times):
                        os.kill(os.getpid(), number)

                PHASES[phase](send)

            run = rig.finished(own.words(folder), own.output, before=trap)
            name = f"{signal.Signals(number).name} x {times}, {phase}"
            found.check(run.code in (128 + number, 130), f"{name}: exit {run.code}: {run.words}")
            found.check("Traceback" not in run.words, f"{name}: {run.words[-900:]}")
            fault = own.goes_on(folder)
            found.check(fault is None, f"{name}: {fault}")
            shutil.rmtree(folder)
    return found


def interrupts_at_random(own: Rig, count: int, *, seed: int = 0) -> Counted:
    """Signals at random moments; figures: seconds and steps until the end."""
    rng, found, latencies, bare = random.Random(seed), Counted(), [], 0
    for index in range(count):
        found.cases += 1
        folder, number = own.folder(), (2, 15, 1)[index % 3]
        run = rig.start(own.words(folder), own.output)
        time.sleep(rng.uniform(0, own.seconds))
        began = time.monotonic()
        run.send(number)
        run.wait(60)
        name = f"{signal.Signals(number).name} at random, {index}"
        if run.code not in (0, 128 + number):
            # before its first line, and after its last, the system ends a process by itself
            ended = (folder / "report.html").is_file() or not (folder / "run.json").is_file()
            bare += 1
            found.check(run.code == -number and ended, f"{name}: {run.code}: {run.words[-500:]}")
        elif run.code:
            latencies.append(time.monotonic() - began)
        fault = own.goes_on(folder)
        found.check(fault is None, f"{name}: {fault}")
        shutil.rmtree(folder)
    if latencies:
        latencies.sort()
        found.figures["median seconds from signal to end"] = round(
            latencies[len(latencies) // 2], 3
        )
    found.figures["before or after the program's own lines"] = bare
    return found


# --- F-05, F-14: a disk or a memory that is too small ---------------------------------------------


def full_disk(own: Rig, sizes: list[int]) -> Counted:
    """A disk of so many bytes, then one with space. Needs the right to mount."""
    found, codes = Counted(), []
    for size in sizes:
        found.cases += 1
        disk = own.place / f"disk-{size}"
        disk.mkdir()
        how = ["mount", "-t", "tmpfs", "-o", f"size={max(4096, size)}", "lorica", str(disk)]
        subprocess.run(how, check=True)
        try:
            run = rig.finished(own.words(disk / "run"), own.output)
            codes.append(run.code)
            name = f"disk of {size} bytes"
            found.check(run.code in (0, 1, 2), f"{name}: exit {run.code}: {run.words[-900:]}")
            if run.code:
                said = any(w in run.words for w in ("No space left", "space on", "free space"))
                found.check(said, f"{name}: it does not say why: {run.words[-500:]}")
            found.check("Traceback" not in run.words, f"{name}: {run.words[-900:]}")
            named, whole = rig.names_of_steps(disk / "run"), rig.whole_steps(disk / "run")
            found.check(named == whole, f"{name}: of {named} whole are {whole}")
            subprocess.run(
                ["mount", "-o", "remount,size=64m", str(disk)], check=True, capture_output=True
            )
            fault = own.goes_on(disk / "run")
            found.check(fault is None, f"{name}, with space again: {fault}")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    found.figures["runs that failed for lack of space"] = sum(code != 0 for code in codes)
    return found


def short_files(own: Rig, limits: list[int]) -> Counted:
    """No file may be longer than so many bytes; then any. For those who may not mount."""
    found = Counted()
    for limit in limits:
        found.cases += 1
        folder = own.folder()

        def trap(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        run = rig.finished(own.words(folder), own.place / "limited.txt", before=trap)
        name = f"files of {limit} bytes"
        found.check(run.code in (0, 1, 2), f"{name}: exit {run.code}: {run.words[-900:]}")
        found.check("Traceback" not in run.words, f"{name}: {run.words[-900:]}")
        named, whole = rig.names_of_steps(folder), rig.whole_steps(folder)
        found.check(named == whole, f"{name}: of {named} whole are {whole}")
        fault = own.goes_on(folder)
        found.check(fault is None, f"{name}, then without limit: {fault}")
    return found


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def capped_memory(own: Rig, shares: list[float]) -> Counted:
    """Only this share of the address space that a run asks for beyond its start."""
    note = own.place / "peak.txt"

    def measured() -> None:
        before = _virtual_bytes()
        real = running.dress

        def dressed(path: Path) -> None:
            real(path)
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in lines if "VmPeak" in line)
            note.write_text(str(peak - before))

        running.dress = dressed

    assert rig.finished(own.words(own.folder()), own.output, before=measured).code == 0
    needed, found = int(note.read_text()), Counted()
    found.figures["bytes asked for"] = needed
    for share in shares:
        found.cases += 1
        folder = own.folder()

        def trap(share: float = share) -> None:
            limit = _virtual_bytes() + int(needed * share)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        name = f"{share:.0%} of the memory"
        try:
            run = rig.start(own.words(folder), own.output, before=trap)
            run.wait(30)
            found.figures[name] = f"exit {run.code}"
        except TimeoutError as error:
            found.violations.append(f"{name}: {error}")
        named, whole = rig.names_of_steps(folder), rig.whole_steps(folder)
        found.check(named == whole, f"{name}: of {named} whole are {whole}")
        fault = own.goes_on(folder)
        found.check(fault is None, f"{name}, then without limit: {fault}")
    return found


# --- F-10, F-11, F-13: what is not finite, what does not fit --------------------------------------

_SMALL = {"batch_size": 2, "max_steps": 6, "save_steps": 1, "eval_steps": 3, "logging_steps": 1}


def _small_run(folder: Path, *, resume: bool = False, **changes: Any) -> None:
    loop.train(
        model_with("a"),
        {"a": examples(1, 12)},
        TrainSettings(**{**_SMALL, "learning_rate": 1e-2, **changes}),
        output_dir=folder,
        eval_data=examples(2, 4),
        task=CausalLM.of(WordTokenizer()),
        resume=resume,
    )


def _not_finite(folder: Path) -> list[str]:
    """Tensors on the disk with a NaN or an infinity."""
    return [
        f"{file.relative_to(folder)}: {key}"
        for file in folder.rglob("*.safetensors")
        for key, tensor in safetensors.torch.load_file(file).items()
        if not torch.isfinite(tensor).all()
    ]


def _poison(kind: str, step: int) -> tuple[Any, str, Any]:
    """(where, name, replacement) that makes something not finite from that step on."""
    real = CausalLM.losses
    count = [0]

    def losses(self, model, batch):
        if model.training:
            count[0] += 1
        if count[0] != step or not model.training:
            return real(self, model, batch)
        if kind == "base weight":
            weight = next(model.parameters())
            before, weight.data = weight.data, torch.full_like(weight, math.nan)
            try:
                return real(self, model, batch)
            finally:
                weight.data = before
        found = real(self, model, batch)
        if kind == "gradient":
            found[0].register_hook(lambda gradient: gradient * math.inf)
            return found
        return [found[0] * math.inf]

    return CausalLM, "losses", losses


POISONS = ("base weight", "label weight", "gradient", "learning rate")


def not_finite(place: Path, seeds: int, kinds: tuple[str, ...] = POISONS) -> Counted:
    """A NaN or infinity in each kind of place, at a step that the seed chooses."""
    found, stopped = Counted(), 0
    for seed in range(seeds):
        for kind in kinds:
            found.cases += 1
            folder, step = place / f"{kind}-{seed}", 1 + seed % 5
            name = f"{kind}, step {step}, seed {seed}"
            if kind == "learning rate":
                # settings take no such rate, so it is put into the engine
                trap = mock.patch.object(engine, "learning_rate", lambda *of: 1e10)
            else:
                trap = mock.patch.object(*_poison(kind, step))
            try:
                with trap:
                    _small_run(folder, seed=seed)
                found.check(kind == "learning rate", f"{name}: nothing stopped it")
            except NonFiniteError as error:
                stopped += 1
                found.check("record" in str(error), f"{name}: no records are named: {error}")
            except LoricaError as error:
                found.violations.append(f"{name}: {type(error).__name__}: {error}")
            found.check(not _not_finite(folder), f"{name}: on the disk: {_not_finite(folder)}")
            if kind != "learning rate":
                newest = max(rig.whole_steps(folder), default=0)
                found.check(newest == step - 1, f"{name}: the newest checkpoint is {newest}")
            shutil.rmtree(folder, ignore_errors=True)
    found.figures["runs stopped"] = stopped
    return found


class _Allocations(TorchDispatchMode):
    """Lets the n-th operation of torch fail for want of memory."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("tried to allocate 1.00 GiB")
        return function(*arguments, **(named or {}))


def failing_allocations(place: Path, *, every: int = 1) -> Counted:
    """The n-th operation of the third step, for every n (or every so-and-so-manieth), fails."""
    real, found = Engine.step, Counted()
    counted: list[int] = []

    def run(at: int, folder: Path) -> None:
        def step(self, trainees, work):
            if trainees[0].step != 2:
                return real(self, trainees, work)
            with _Allocations(at) as mode:
                done = real(self, trainees, work)
            counted.append(mode.count)
            return done

        with mock.patch.object(Engine, "step", step):
            _small_run(folder, max_steps=3)

    run(0, place / "whole")
    wanted = (place / "whole/adapter/adapter_model.safetensors").read_bytes()
    for at in range(1, counted[0] + 1, every):
        found.cases += 1
        folder = place / f"at-{at}"
        try:
            run(at, folder)
            found.violations.append(f"operation {at}: nothing was said")
        except OutOfMemory as error:
            told = str(error)
            right = "batch_size: 2 -> 1" in told and "resume=True" in told
            found.check(right, f"operation {at}: no advice in {told}")
        except Exception as error:
            found.violations.append(f"operation {at}: {type(error).__name__}: {error}")
        found.check(rig.whole_steps(folder)[:1] == [2], f"operation {at}: step 2 is not there")
        if at % (10 * every) == 1:
            _small_run(folder, resume=True, max_steps=3)
            same = (folder / "adapter/adapter_model.safetensors").read_bytes() == wanted
            found.check(same, f"operation {at}: gone on with, another adapter")
        shutil.rmtree(folder)
    found.figures["operations in a step"] = counted[0]
    return found


# --- F-08: damage ---------------------------------------------------------------------------------


def _flip(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def damage(place: Path, save: Callable[[Path, int], Any], load: Callable[[Path], Any]) -> Counted:
    """Every file of each of the three newest checkpoints, damaged in seven ways."""
    found, rng = Counted(), random.Random(0)
    ready = place / "ready"
    for step in (1, 2, 3):
        save(ready, step)
    files = sorted(
        str(p.relative_to(ready / "step-00000003"))
        for p in (ready / "step-00000003").rglob("*")
        if p.is_file()
    )
    ways: dict[str, Callable[[Path, Path], Any]] = {
        "deleted": lambda path, other: path.unlink(),
        "empty": lambda path, other: path.write_bytes(b""),
        "half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "shorter": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
        "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"x"),
        "one bit": lambda path, other: _flip(path, rng),
        "of another step": lambda path, other: shutil.copy(other, path),
    }
    for step in (3, 2, 1):
        for file in files:
            for way, make in ways.items():
                found.cases += 1
                folder = place / "case"
                shutil.copytree(ready, folder)
                other = 2 if step == 3 else 3
                for newer in range(step + 1, 4):  # or the damaged one would not be looked at
                    shutil.rmtree(folder / f"step-{newer:08d}")
                make(folder / f"step-{step:08d}" / file, ready / f"step-{other:08d}" / file)
                name = f"{file} of step {step} {way}"
                try:
                    state, notes = load(folder)
                    found.check(state.step == step - 1, f"{name}: step {state.step} was taken")
                    found.check(len(notes) == 1, f"{name}: told {notes}")
                except LoricaError as error:
                    found.check(step == 1 and error.problems != (), f"{name}: {error}")
                shutil.rmtree(folder)
    return found


# --- F-21, F-24, F-25, F-29 -----------------------------------------------------------------------


def starters(place: Path, rounds: int, at_once: int = 4) -> Counted:
    """So many processes begin a run in one folder at the same moment: one may."""
    found = Counted()
    for number in range(rounds):
        found.cases += 1
        folder, gate = place / f"shared-{number}", place / f"gate-{number}"

        def begin(folder: Path = folder, gate: Path = gate) -> None:
            while not gate.exists():
                pass
            try:
                with RunFolder.create(folder) as held:
                    RunRecorder(held, config="r: 4\n").start({})
                    time.sleep(0.25)
            except RunLocked:
                raise SystemExit(5) from None

        outputs = [place / f"starter-{i}.txt" for i in range(at_once)]
        runs = [rig.fork(begin, output) for output in outputs]
        time.sleep(0.02)
        gate.touch()
        codes = sorted(run.wait(30) for run in runs)
        words = [run.words for run in runs]
        found.check(codes == [0] + [5] * (at_once - 1), f"round {number}: {codes} {words}")
    return found


def pauses(own: Rig, cycles: int) -> Counted:
    """SIGSTOP and SIGCONT again and again in one run."""
    found, folder = Counted(cases=1), own.folder()
    run = rig.start(own.words(folder), own.output)
    made = 0
    for _ in range(cycles):
        time.sleep(own.seconds / cycles / 2)
        if run.over():
            break
        run.send(signal.SIGSTOP)
        time.sleep(0.02)
        run.send(signal.SIGCONT)
        made += 1
    found.check(run.wait() == 0, f"exit {run.code}: {run.words[-500:]}")
    found.check(rig.digest(folder) == own.wanted, "another adapter")
    found.figures["cycles"] = made
    return found


def replaced_base(own: Rig, times: int) -> Counted:
    """The file of the base is overwritten, in its place, while a run trains on it."""
    found = Counted()
    weights = own.place / "base/model.safetensors"
    raw = weights.read_bytes()
    for _ in range(times):
        found.cases += 1
        folder = own.folder()

        def trap() -> None:
            def spoil() -> None:
                with open(weights, "r+b") as file:
                    file.truncate(100)

            _at(Engine, "step", spoil, when=lambda self, t, w: t[0].step == 2)

        run = rig.finished(own.words(folder), own.output, before=trap)
        weights.write_bytes(raw)
        found.check(run.code == 0, f"exit {run.code}: {run.words[-500:]}")
        if run.code == 0:
            found.check(rig.digest(folder) == own.wanted, "another adapter")
    return found

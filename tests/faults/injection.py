"""Faults at the n-th call to the system, for every n until the operation gets through.

As SQLite tests itself: the calls that change a disk are counted, and one of them (or it and all
later ones) fails, or the process dies there. Then it is looked at what is left.
"""

import builtins
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from faults.rig import fork
from lorica.errors import LoricaError
from lorica.files import folder as publishing

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "chmod")
MODES = ("kill", "EIO once", "EIO forever", "ENOSPC once", "ENOSPC forever")
KILLED = 9


@contextmanager
def watched(before: Callable[[str], None]) -> Iterator[None]:
    """Call `before` with the name of every call of this process that can change a disk."""

    def around(name: str, original: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            before(name)
            return original(*arguments, **named)

        return call

    def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            before("open")
        return real_open(file, mode, *arguments, **named)

    real_open = builtins.open
    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, around(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        exchange = around("exchange", publishing.exchange)
        stack.enter_context(mock.patch.object(publishing, "exchange", exchange))
        yield


def count_calls(work: Callable[[], object]) -> int:
    """How many calls `work` makes where nothing fails."""
    calls: list[str] = []
    with watched(calls.append):
        work()
    return len(calls)


@contextmanager
def failing(at: int, mode: str) -> Iterator[None]:
    """Let call number `at` fail, or all from it on; or die there."""
    made = 0

    def before(name: str) -> None:
        nonlocal made
        made += 1
        if mode == "kill":
            if made == at:
                os._exit(KILLED)
            return
        word, often = mode.split()
        if made == at or (often == "forever" and made > at):
            number = getattr(errno, word)
            raise OSError(number, os.strerror(number))

    with watched(before):
        yield


@dataclass
class Operation:
    """What is put to the test.

    Attributes:
        name: for the table.
        prepare: makes the folder as it is before; called once, the result is copied.
        work: the operation itself.
        judge: what is wrong with the folder afterwards, given whether the operation came to its
            end; None where nothing is. It may change the folder.
    """

    name: str
    prepare: Callable[[Path], object]
    work: Callable[[Path], object]
    judge: Callable[[Path, bool], str | None]


@dataclass
class Found:
    """Cases that were tried and what was wrong in them."""

    operation: str
    calls: int = 0
    cases: int = 0
    violations: list[str] = field(default_factory=list)


def sweep(operation: Operation, place: Path, *, modes: tuple[str, ...] = MODES) -> Found:
    """Every call of an operation times every kind of fault."""
    ready = place / "ready"
    ready.mkdir(parents=True)
    operation.prepare(ready)
    folder = place / "case"
    shutil.copytree(ready, folder)
    found = Found(operation.name, calls=count_calls(lambda: operation.work(folder)))
    for mode in modes:
        for at in range(1, found.calls + 1):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(ready, folder)
            found.cases += 1
            if fault := _case(operation, folder, at, mode, place / "words.txt"):
                found.violations.append(f"{operation.name}, {mode}, call {at}: {fault}")
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _case(operation: Operation, folder: Path, at: int, mode: str, output: Path) -> str | None:
    def work() -> None:
        with failing(at, mode):
            operation.work(folder)

    if mode == "kill":
        run = fork(work, output)
        if run.wait() not in (0, KILLED):
            return f"exit {run.code}: {run.words}"
        return operation.judge(folder, run.code == 0)
    try:
        work()
        ended = True
    except (LoricaError, OSError):
        ended = False
    except Exception as error:
        return f"{type(error).__name__} instead of an error of Lorica: {error}"
    return operation.judge(folder, ended)


def crash_again_and_again(operation: Operation, place: Path, times: int = 5) -> Found:
    """Die `times` times at one and the same call, for every call, and only then look."""
    ready, folder = place / "ready", place / "case"
    ready.mkdir(parents=True)
    operation.prepare(ready)
    shutil.copytree(ready, folder)
    name = f"{operation.name}, {times} crashes in a row"
    found = Found(name, calls=count_calls(lambda: operation.work(folder)))
    for at in range(1, found.calls + 1):
        shutil.rmtree(folder)
        shutil.copytree(ready, folder)
        found.cases += 1
        ended = False

        def work(at: int = at) -> None:
            with failing(at, "kill"):
                operation.work(folder)

        for _ in range(times):
            run = fork(work, place / "words.txt")
            ended = run.wait() == 0
            if run.code not in (0, KILLED):
                found.violations.append(f"{name}, call {at}: exit {run.code}: {run.words}")
        if fault := operation.judge(folder, ended):
            found.violations.append(f"{name}, call {at}: {fault}")
    shutil.rmtree(folder)
    return found

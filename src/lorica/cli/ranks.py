"""Several processes under torchrun: who this one is, and what they cannot share.

Each process takes a share of the adapters of a run; see `records.crew`. They need no messages of
torch.distributed, so none is set up: torchrun starts the processes, and says which is which.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.cli.voice import Voice
from lorica.errors import ConfigError, LoricaError
from lorica.records.folder import lock_is_held
from lorica.records.read import read_manifest

_PAUSE = 0.1
TELL_AFTER, GIVE_UP_AFTER = 20.0, 600.0
"""Seconds of waiting for the first process."""
_PROCESSES = Path("/proc")
_GIVEN = ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""What a launcher gives each of its processes, and does not have itself."""


@dataclass(frozen=True)
class Ranks:
    """What torchrun says of this process.

    Attributes:
        rank: of the process, from 0.
        size: how many there are.
        token: the same for all that were started together, and for no others.
    """

    rank: int
    size: int
    token: str

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Ranks(0, 1, "")
"""A process that nobody else was started with."""


def ranks() -> Ranks:
    """This process among those of torchrun; `ALONE` outside of it.

    Raises:
        ConfigError: they are on several machines, or may be.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        return ALONE
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"RANK and WORLD_SIZE speak of {size} processes, and nothing says that they are on one "
            "machine",
            expected="LOCAL_WORLD_SIZE beside them, as torchrun sets it",
            mend="start them with torchrun, or unset RANK and WORLD_SIZE for a process alone",
        )
    if (local := int(os.environ["LOCAL_WORLD_SIZE"])) != size:
        raise ConfigError(
            f"torchrun started {size} processes, {local} of them on this machine",
            expected="processes of one machine, which share a folder and its locks",
            mend="for a search on several machines start it on each, with a study that all reach "
            "(search: storage) and an output folder of its own",
        )
    started, launcher = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), _launcher()
    return Ranks(int(os.environ["RANK"]), size, f"{launcher}-{_began(launcher)}-{started}")


def _launcher() -> int:
    """The process that started all of them: the nearest one above that was not started as this one
    was. A script in between was.
    """
    given = {f"{key}={os.environ[key]}".encode() for key in _GIVEN if key in os.environ}
    process = os.getppid()
    with suppress(OSError):  # one that ends in this moment
        while given <= _surroundings(process):
            process = int(_facts_of(process)[1])
    return process


def _surroundings(process: int) -> set[bytes]:
    """Environment of a process as it began; nothing where the system does not say."""
    try:
        return {*(_PROCESSES / str(process) / "environ").read_bytes().split(b"\0")}
    except OSError:
        return set()


def _began(process: int) -> str:
    """When a process began, for its number is given to others later, and in a container it may be
    the same every time; nothing where the system does not say.
    """
    try:
        return _facts_of(process)[19]
    except OSError:
        return ""


def _facts_of(process: int) -> list[str]:
    """What the system says of a process, from the third field on: those before hold its name."""
    line = (_PROCESSES / str(process) / "stat").read_text()
    return line.rpartition(")")[2].split()


def refuse_ranks(what: str) -> None:
    """Raises ConfigError where several processes would all do the same."""
    if (found := ranks()).size > 1:
        raise ConfigError(
            f"torchrun started {found.size} processes, and {what} is work for one: each would do "
            "the same",
            expected="adapters to share out: lorica search, or lorica train with a list adapters",
            mend="start it without torchrun; or let lorica train spread the base over them: "
            "--shard-base",
        )


def choose_device() -> None:
    """Let this process use the GPU of its place on the machine."""
    if torch.cuda.is_available() and torch.cuda.device_count():
        place = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(place % torch.cuda.device_count())


def beside(found: Ranks) -> int:
    """How many processes share the memory that this one uses."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 1
    return -(-found.size // max(1, devices))


def wait_for_first(path: Path, found: Ranks, voice: Voice) -> None:
    """Wait until the first process has begun the run in `path`, or has gone on with it.

    Raises:
        LoricaError: nobody does so any more, or this one does not recognise it.
    """
    launcher, began, told = _launcher(), time.monotonic(), False
    while not _has_begun(path, found):
        waited = time.monotonic() - began
        if _launcher() != launcher:
            raise LoricaError("the process that started this one is gone")
        if waited > GIVE_UP_AFTER:
            raise LoricaError(
                f"process {found.rank} has waited {waited:.0f} s for the first one to begin {path}",
                expected="processes of one torchrun, by which they know each other",
                mend="start lorica without a script or program in between, or write exec before "
                "lorica in that script",
            )
        if waited > TELL_AFTER and not told:
            told = True
            voice.say(f"process {found.rank} waits for the first one to begin {path}", "warning")
        time.sleep(_PAUSE)


def _has_begun(path: Path, found: Ranks) -> bool:
    """Where the system does not say when a process began, an earlier run may bear the token of this
    one; then the first process must be there.
    """
    if token_of(path) != found.token:
        return False
    if _began(_launcher()) or lock_is_held(path):
        return True
    return _known(path).get("status") == "finished"


def token_of(path: Path) -> str | None:
    """By which processes of one start know each other's run folder."""
    return _known(path).get("processes", {}).get("token")


def _known(path: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError):  # it may go in this moment: the first one begins anew
        return read_manifest(path / "run.json")
    return {}

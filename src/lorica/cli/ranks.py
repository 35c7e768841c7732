"""Several processes under torchrun: who this one is, and what they cannot share.

Each process takes a share of the adapters of a run; see `records.crew`. They need no messages of
torch.distributed, so none is set up: torchrun starts the processes, and says which is which.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lorica.errors import ConfigError, LoricaError
from lorica.records.read import read_manifest

_PAUSE = 0.1


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
        ConfigError: they are on several machines.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        return ALONE
    if (local := int(os.environ.get("LOCAL_WORLD_SIZE", size))) != size:
        raise ConfigError(
            f"torchrun started {size} processes, {local} of them on this machine",
            expected="processes of one machine, which share a folder and its locks",
            mend="for a search on several machines start it on each, with a study that all reach "
            "(search: storage) and an output folder of its own",
        )
    started = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Ranks(int(os.environ["RANK"]), size, f"{os.getppid()}-{started}")


def refuse_ranks(what: str) -> None:
    """Raises ConfigError where several processes would all do the same."""
    if (found := ranks()).size > 1:
        raise ConfigError(
            f"torchrun started {found.size} processes, and {what} is work for one: each would do "
            "the same",
            expected="adapters to share out: lorica search, or lorica train with a list adapters",
            mend="start it without torchrun; one adapter is not trained by several processes, and "
            "a base that does not fit into one is not spread over them (quantize makes it smaller)",
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


def wait_for_first(path: Path, found: Ranks) -> None:
    """Wait until the first process has begun the run in `path`, or has gone on with it.

    Raises:
        LoricaError: nobody does so any more.
    """
    parent = os.getppid()
    while token_of(path) != found.token:
        if os.getppid() != parent:
            raise LoricaError("the process that started this one is gone")
        time.sleep(_PAUSE)


def token_of(path: Path) -> str | None:
    """By which processes of one start know each other's run folder."""
    file = path / "run.json"
    return read_manifest(file).get("processes", {}).get("token") if file.is_file() else None

"""The processes that hold one base together, and what they say to each other.

All run the same program on the same records, so each knows what the others do; only numbers that
one of them alone has are exchanged. Collectives are matched by their order: whatever decides how
many there are must be the same in every process, or be agreed on here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lorica.errors import ConfigError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others in a collective: as long as one of them may take to write
a checkpoint.
"""


_GONE = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|(closed|reset) by (the |remote )?peer"
    r"|broken pipe|socket (was )?closed|timed? ?out|ncclRemoteError|remote process (has )?exited",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store say where another process is gone."""


@dataclass(frozen=True)
class Processes:
    """Those that were started together, as one of them sees them.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: where the tensors lie that are exchanged, and the share of the base.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def mesh(self) -> DeviceMesh:
        """All of them in one row."""
        return init_device_mesh(self.device.type, (self.size,))

    def from_one(self, tensor: Tensor, rank: int) -> Tensor:
        """What the tensor holds in one of them: it is written over in all others."""
        dist.broadcast(tensor, rank)
        return tensor

    def highest(self, number: int) -> int:
        """The highest of their numbers."""
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of what they have, number by number; exact where one alone has another than 0."""
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return found.tolist()

    def text_of_first(self, text: str) -> str:
        """The text of the first process."""
        raw = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = self.from_one(torch.tensor(len(raw), device=self.device), 0)
        if not self.first:
            raw = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        return bytes(self.from_one(raw, 0).tolist()).decode()

    def wait(self) -> None:
        """Until all of them are here."""
        self.highest(0)


def is_gone(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """What torch says in many lines, in one."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def here() -> Processes | None:
    """The processes that this one has joined; None where it has not."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    return Processes(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def joined(rank: int, size: int) -> Iterator[Processes]:
    """Meet the processes that torchrun started with this one, each with a device of its own.

    Args:
        rank, size: as torchrun says.

    Raises:
        ConfigError: there are GPUs, but not one for each.
    """
    device = torch.device("cpu")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < devices < size:
        raise ConfigError(
            f"{size} processes hold the base together, and the machine has {devices} GPU",
            expected="a GPU for each of them, or none",
            mend=f"--nproc-per-node {devices}; or on the processor: CUDA_VISIBLE_DEVICES= torchrun",
        )
    if devices:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    store, _, _ = next(rendezvous("env://", rank, size))
    # torchrun's store outlives the processes: after a restart it holds the addresses of the dead
    own = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=own, rank=rank, world_size=size, timeout=PATIENCE, device_id=bound
    )
    yield Processes(rank, size, device)
    dist.destroy_process_group()  # not after an error: it would wait for the others

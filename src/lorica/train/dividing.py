"""The work of a step, divided among processes that hold the base together (`base.sharded`).

Every process knows all the work and all adapters, and makes the same plan. In a run of as many
adapters as processes, or more, an adapter is one process's: what it comes to does not depend on its
company, so its gradients are those of one process, to the last bit. With fewer, the records of each
micro-batch are dealt out, and the gradients of the parts are added in the order of the processes:
the same in every run, but not the bits of one process.

A pass gathers the layers of the base, in which all take part; so all make as many passes, and one
that has run out of work makes a pass that is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.attach.site import is_site
from lorica.base.processes import Processes
from lorica.data.encode import Example
from lorica.tasks.task import Task
from lorica.train.engine import Engine, Losses, Trainee, Work
from lorica.train.seed import derive_seed

Share = list[list[Sequence[Example]]]


class Divided:
    """What `Engine` is given as `dividing`.

    Args:
        processes: those that hold the base.
        whole: whether each adapter is one process's, also when fewer are left than processes: what
            an adapter comes to must not depend on when those beside it end.
    """

    def __init__(self, processes: Processes, *, whole: bool) -> None:
        self.processes, self.whole = processes, whole

    def notes(self, trainees: Sequence[Trainee]) -> list[str]:
        """What the user should be told of how the work can be divided."""
        size = self.processes.size
        small = [t for t in trainees if t.settings.batch_size < size]
        if self.whole or not small:
            return []
        names = ", ".join(t.adapter.name for t in small)
        return [
            f"batch_size of {names} is below the number of processes ({size}): some of them have "
            "no record of a micro-batch, and wait; choose a larger one with fewer "
            "gradient_accumulation_steps"
        ]

    def differentiate(
        self, engine: Engine, trainees: Sequence[Trainee], work: Work, labels: Sequence[int]
    ) -> Losses:
        """Forward and backward of this process's share, and then what all have found."""
        rank, size = self.processes.rank, self.processes.size
        shares = (whole_adapters if self.whole else dealt_records)(work, size)
        number = [len(engine.passes(trainees, share)) for share in shares]
        part = 0 if self.whole else rank
        losses = engine.differentiate(trainees, shares[rank], labels, part=part)
        shortest = min((e for b in work for block in b for e in block if e.num_trained), key=len)
        seed = derive_seed(trainees[0].settings.seed, trainees[0].step)
        for _ in range(max(number) - number[rank]):
            idle_pass(engine.model, engine.task, shortest, seed=seed)
        return self._together(trainees, shares, losses)

    def _together(
        self, trainees: Sequence[Trainee], shares: Sequence[Share], losses: Losses
    ) -> Losses:
        """Give every process the gradients and losses of all, added in the order of processes."""
        parameters = [list(t.adapter.parameters()) for t in trainees]
        own = [[p.grad for p in held] for held in parameters]
        sums: list[list[Tensor | None]] = [[None] * len(held) for held in parameters]
        total = [[0.0] * len(batches) for batches in losses]
        for rank, share in enumerate(shares):
            has = [i for i, batches in enumerate(share) if any(batches)]
            held = [(i, n, p) for i in has for n, p in enumerate(parameters[i])]
            head = self._head(rank, [losses[i] for i in has], [own[i][n] for i, n, _ in held])
            for i, n_micro, loss in _numbered([losses[i] for i in has], has, head):
                total[i][n_micro] += loss
            flags = head[len(head) - len(held) :]
            there = [one for one, flag in zip(held, flags, strict=True) if flag]
            for (i, n, _), found in zip(there, self._gradients(rank, there, own), strict=True):
                sum_so_far = sums[i][n]
                sums[i][n] = found if sum_so_far is None else sum_so_far + found
        for held, found in zip(parameters, sums, strict=True):
            for parameter, gradient in zip(held, found, strict=True):
                parameter.grad = gradient
        return total

    def _head(
        self, rank: int, losses: Sequence[Sequence[float]], gradients: Sequence[Tensor | None]
    ) -> list[float]:
        """The losses of a process, and of which of its tensors it has gradients."""
        flat = [loss for batches in losses for loss in batches]
        flat += [float(gradient is not None) for gradient in gradients]
        numbers = torch.tensor(flat, dtype=torch.float64, device=self.processes.device)
        return self.processes.from_one(numbers, rank).tolist()

    def _gradients(
        self,
        rank: int,
        there: Sequence[tuple[int, int, nn.Parameter]],
        own: Sequence[Sequence[Tensor | None]],
    ) -> Iterator[Tensor]:
        """The gradients of a process, in messages of one dtype each."""
        made: dict[int, Tensor] = {}
        for dtype in sorted({p.dtype for _, _, p in there}, key=str):
            held = [(i, n, p) for i, n, p in there if p.dtype == dtype]
            if rank == self.processes.rank:
                flat = torch.cat([_of(own[i][n]).flatten() for i, n, _ in held])
            else:
                size = sum(p.numel() for _, _, p in held)
                flat = torch.empty(size, dtype=dtype, device=held[0][2].device)
            parts = self.processes.from_one(flat, rank).split([p.numel() for _, _, p in held])
            for (_, _, p), found in zip(held, parts, strict=True):
                made[id(p)] = found.clone().view_as(p)
        for _, _, p in there:
            yield made[id(p)]


def _of(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _numbered(
    losses: Sequence[Sequence[float]], has: Sequence[int], head: Sequence[float]
) -> Iterator[tuple[int, int, float]]:
    """(trainee, micro-batch, loss) of what begins a head."""
    values = iter(head)
    for i, batches in zip(has, losses, strict=True):
        for micro in range(len(batches)):
            yield i, micro, next(values)


def whole_adapters(work: Work, size: int) -> list[Share]:
    """The share of each process: adapters, the longest first to whoever has the least so far."""
    tokens = [sum(len(e) for block in batches for e in block) for batches in work]
    load, owner = [0] * size, [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: (-tokens[i], i)):
        owner[i] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[i]] += tokens[i]
    return [
        [list(work[i]) if owner[i] == rank else [[] for _ in work[i]] for i in range(len(work))]
        for rank in range(size)
    ]


def dealt_records(work: Work, size: int) -> list[Share]:
    """The share of each process: of each micro-batch the records that go to it, in their order; the
    longest first to whoever has the least so far.
    """
    load = [0] * size
    shares: list[Share] = [[] for _ in range(size)]
    for batches in work:
        for share in shares:
            share.append([])
        for block in batches:
            owner = [0] * len(block)
            for n in sorted(range(len(block)), key=lambda n: (-len(block[n]), n)):
                owner[n] = min(range(size), key=lambda rank: (load[rank], rank))
                load[owner[n]] += len(block[n])
            for rank, share in enumerate(shares):
                share[-1].append([e for e, own in zip(block, owner, strict=True) if own == rank])
    return shares


def idle_pass(model: Any, task: Task, example: Example, *, seed: int) -> None:
    """A pass that gathers what every pass does, forward and backward, and changes nothing; `seed`
    of what the base draws in it.
    """
    torch.manual_seed(seed)
    batch = task.collate([[example]], model)
    with task.running(model), activate(model, None):
        sum(task.losses(model, batch)).backward()  # type: ignore[union-attr]


@contextmanager
def differentiated(model: Any) -> Iterator[None]:
    """Let gradients go down to the embeddings, whatever trains: then the backward passes of all
    processes gather the same layers in the same order.
    """

    def ask(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    table = model.get_input_embeddings()
    # Before FSDP looks at what the embeddings say, where some adapter lies there: its process would
    # gather them in the backward pass, and the others would not.
    handle = table.register_forward_hook(ask, prepend=is_site(table))
    try:
        yield
    finally:
        handle.remove()

"""One optimizer step for N adapters on one base. One adapter is N = 1, through the same code.

A step takes the micro-batches of every adapter. Where the task lets adapters share a forward pass,
the k-th micro-batches of all of them lie side by side in one flat row, each adapter's rows in a
block of their own; otherwise they go one after the other. Either way

    loss of adapter a = sum over its labels in the whole step of -log p / number of these labels

so accumulating over micro-batches of unequal length gives exactly the gradient of one large batch.
The losses of all adapters are added and differentiated once: the base is frozen and no tensor
belongs to two adapters, so each gets the gradient of its own loss. Clipping, schedule, optimizer
and random numbers are each adapter's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lorica.attach.activate import Activation, activate
from lorica.attach.handle import Adapter
from lorica.attach.plates import Route
from lorica.attach.probe import unvisited
from lorica.base.batch import beside
from lorica.base.lean import lean_parts
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import NonFiniteError, TrainingError
from lorica.methods.between import Between
from lorica.tasks.task import Batch, Task, answering
from lorica.train.checkpointing import Checkpointing, checkpoints, turn_off, turn_on
from lorica.train.optim import learning_rate, make_optimizer
from lorica.train.passes import groups_of, named_ranges, passes_of, route_of
from lorica.train.seed import derive_seed

Skipping = Callable[[Sequence[Sequence[Example]], Batch], AbstractContextManager]
Collating = Callable[[Sequence[Adapter], Sequence[Sequence[Example]]], Batch]
Sharing = Callable[[Sequence[Adapter], Sequence[Sequence[Example]], Batch], AbstractContextManager]


def nothing_shared(
    adapters: Sequence[Adapter], blocks: Sequence[Sequence[Example]], batch: Batch
) -> AbstractContextManager:
    """Every block of a pass goes through all layers."""
    return nullcontext()


Work = Sequence[Sequence[Sequence[Example]]]
"""For each trainee its micro-batches; a block without examples takes part in no pass."""

Losses = list[list[float]]
"""For each trainee the summed loss (nats) of each of its micro-batches."""


class Dividing(Protocol):
    """How the work of a step is divided among processes that hold the base together."""

    def differentiate(
        self, engine: Engine, trainees: Sequence[Trainee], work: Work, labels: Sequence[int]
    ) -> Losses:
        """What `Engine.differentiate` does, by all processes: every one of them ends with the
        gradients and losses of the whole work.
        """
        ...


class Trainee:
    """An adapter in training, with everything that is its own.

    Attributes:
        adapter: what trains.
        settings: its settings.
        total: optimizer steps of the whole run.
        step: optimizer steps done.
        between: what the method does between the steps.
    """

    def __init__(self, adapter: Adapter, settings: TrainSettings, total: int) -> None:
        self.adapter, self.settings, self.total, self.step = adapter, settings, total, 0
        self.optimizer = make_optimizer(adapter.named_parameters(), settings)
        self.between = between_of(adapter, total, settings.seed)

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""
        return learning_rate(self.step, self.total, self.settings)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step of one adapter did.

    Attributes:
        loss: mean negative log-likelihood (nats) of the trained tokens of the step.
        grad_norm: norm of all its gradients before clipping.
        learning_rate: the rate used.
        tokens: real tokens seen, trained or not; of source and target where there are both.
        trained_tokens: tokens with a label.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int


class Engine:
    """Runs optimizer steps on a model; knows nothing of files, epochs or displays.

    Args:
        model: a base with the adapters of the trainees attached.
        task: what a loss is.
        gradient_checkpointing: recompute activations in the backward pass, for less memory; see
            `checkpointing`.
        skipping: what must hold during the passes of a batch, given its blocks of examples; see
            `FrozenLayers.skipped`.
        sharing: what must hold during a pass of several adapters; see `SharedLayers.shared`.
        collating: makes the batch of a pass; None: the task, from the blocks alone.
        dividing: for a base that several processes hold together; None: this one has all of it.

    Raises:
        TrainingError: checkpointing was asked of a model that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        gradient_checkpointing: Checkpointing = False,
        skipping: Skipping = lambda blocks, batch: nullcontext(),
        sharing: Sharing = nothing_shared,
        collating: Collating | None = None,
        dividing: Dividing | None = None,
    ) -> None:
        self.dividing = dividing
        self.model, self.task, self.skipping, self.sharing = model, task, skipping, sharing
        self.collating = collating or (lambda adapters, blocks: task.collate(blocks, model))
        self._checked: set[str] = set()
        with activate(model, None):
            self._shares = task.shares(model)
        already = checkpoints(model)
        if already and gradient_checkpointing == "offload":
            raise TrainingError(
                "the model checkpoints already, in a way that keeps activations where they are",
                mend="call model.gradient_checkpointing_disable() before",
            )
        self._checkpoints = bool(gradient_checkpointing) and not already
        if self._checkpoints:
            turn_on(model, gradient_checkpointing)
        self.look_again()

    def look_again(self) -> None:
        """Find out which parts run leaner: adapters that were attached meanwhile decide it too."""
        self.lean = lean_parts(self.model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model as it runs in a step, forward and backward."""
        with self.task.running(self.model), self.lean.running():
            yield

    def close(self) -> None:
        """Leave the model as it was before: without checkpointing."""
        if self._checkpoints:
            turn_off(self.model)
            self._checkpoints = False

    def step(self, trainees: Sequence[Trainee], work: Work) -> list[StepResult]:
        """One optimizer step of each trainee.

        Args:
            work: for each trainee its micro-batches, each a list of examples.

        Raises:
            NonFiniteError: a loss or a gradient is NaN or infinite. No tensor of any adapter was
                changed.
            TrainingError: an adapter sits on layers that the model passed by.
        """
        self.model.train()
        for trainee in trainees:  # a step that failed may have left some
            trainee.optimizer.zero_grad(set_to_none=True)
        labels = [sum(_num_labels(b) for b in batches) for batches in work]
        for trainee, number in zip(trainees, labels, strict=True):
            if not number:
                raise TrainingError(
                    f"adapter {trainee.adapter.name!r}, step {trainee.step + 1}: no token to learn",
                    expected="at least one label that is not -100",
                )
        with resting(_idle(trainees)):
            if self.dividing is None:
                losses = self.differentiate(trainees, work, labels)
            else:
                losses = self.dividing.differentiate(self, trainees, work, labels)
            for trainee in trainees:
                if (penalty := trainee.between.penalty()) is not None:
                    penalty.backward()
        totals = [_totals(*one) for one in zip(work, losses, labels, strict=True)]
        norms = [_clip(t, total) for t, total in zip(trainees, totals, strict=True)]
        return [
            _update(t, total, norm) for t, total, norm in zip(trainees, totals, norms, strict=True)
        ]

    def differentiate(
        self,
        trainees: Sequence[Trainee],
        work: Work,
        labels: Sequence[int],
        *,
        part: int = 0,
    ) -> Losses:
        """Forward and backward of all micro-batches, in this process alone.

        Args:
            labels: trained tokens of each trainee in the whole step, of which this work may be a
                part.
            part: number of that part: each draws its dropout for itself.
        """
        losses = [[0.0] * len(batches) for batches in work]
        for micro, chosen in self.passes(trainees, work):
            found = self._micro_step(
                [trainees[i] for i in chosen],
                [work[i][micro] for i in chosen],
                [labels[i] for i in chosen],
                (micro, part) if part else (micro,),
            )
            for i, loss in zip(chosen, found, strict=True):
                losses[i][micro] = loss
        return losses

    def passes(self, trainees: Sequence[Trainee], work: Work) -> list[tuple[int, list[int]]]:
        """The passes of a step, each as the number of the micro-batches and of the trainees."""
        found = []
        for group in self.groups(trainees):
            for micro in range(max(len(work[i]) for i in group)):
                present = [i for i in group if micro < len(work[i]) and work[i][micro]]
                tokens = [sum(map(len, work[i][micro])) for i in present]
                found += [(micro, chosen) for chosen in passes_of(present, tokens)]
        return found

    def groups(self, trainees: Sequence[Trainee]) -> list[list[int]]:
        """Who may go through one pass with whom; see `passes.groups_of`."""
        adapters = [trainee.adapter for trainee in trainees]
        return groups_of(self.model, adapters, shares=self._shares)

    def _micro_step(
        self,
        trainees: list[Trainee],
        blocks: list[Sequence[Example]],
        labels: list[int],
        micro: tuple[int, ...],
    ) -> list[float]:
        """The summed loss of each block. `micro`: what tells the pass from others of the step."""
        adapters = [t.adapter for t in trainees]
        batch = self.collating(adapters, blocks)
        seeds = tuple(derive_seed(t.settings.seed, t.step, *micro) for t in trainees)
        torch.manual_seed(seeds[0])  # dropout of the base; where there is any, no pass is shared
        # with stages it has the pass for itself
        route = route_of(adapters[0], dropout_seed=seeds[0])
        if len(trainees) > 1:
            names = tuple(adapter.name for adapter in adapters)
            segments = named_ranges(batch.rows or (), names)
            kept = None if batch.kept is None else named_ranges(batch.kept.ranges, names)
            route = Route(names, None, segments, kept, seeds=seeds)
        skipped = self.skipping(blocks, batch)
        shared = nullcontext()
        if len(trainees) > 1:
            shared = self.sharing(adapters, blocks, batch)
        apart = beside(self.model, batch.rows, batch.kept and batch.kept.ranges)
        with skipped, self.running(), apart, shared, Activation(self.model, route):
            losses = self.task.losses(self.model, batch)
            if new := set(route.names) - self._checked:
                self._refuse_unvisited(new, batch)
            shares = [loss / number for loss, number in zip(losses, labels, strict=True)]
            torch.stack(shares).sum().backward()
        return [loss.item() for loss in losses]

    def _refuse_unvisited(self, names: set[str], batch: Batch) -> None:
        """Judge the layers that this pass went by once more as they run in use: training may drop
        layers at random.
        """
        self._checked |= names
        if not unvisited(self.model):
            return
        if self.dividing is not None:  # a pass that the other processes do not make
            _refuse_passed(unvisited(self.model))
        with answering(self.model):
            self.task.losses(self.model, batch)
        if passed := unvisited(self.model):
            _refuse_passed(passed)


def _refuse_passed(passed: Sequence[str]) -> NoReturn:
    raise TrainingError(
        f"{len(passed)} adapted layers were never called: the adapter would have no effect there",
        problems=passed[:10],
        mend="leave them out with exclude_modules",
    )


@dataclass
class _Totals:
    """Sums over the micro-batches of a step; `suspects` are the records of those without a loss,
    `rows` those of all.
    """

    labels: int
    loss: float = 0.0
    tokens: int = 0
    suspects: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def _totals(batches: Sequence[Sequence[Example]], losses: Sequence[float], labels: int) -> _Totals:
    total = _Totals(labels)
    for block, loss in zip(batches, losses, strict=True):
        rows = [e.row for e in block]
        total.rows += rows
        total.loss += loss / labels
        total.tokens += sum(e.num_tokens for e in block)
        if not math.isfinite(loss):
            total.suspects += rows
    return total


def between_of(adapter: Adapter, total: int, seed: int) -> Between:
    """What the method of an adapter does between the steps of a run."""
    make = getattr(adapter.method, "between", None)
    held = {path: (slot.method, slot.tensors) for path, slot in adapter.slots.items()}
    return make(held, total=total, seed=seed) if make else Between()


def at_rest(adapter: Adapter, between: Between, step: int) -> list[nn.Parameter]:
    """What does not train in the step after `step` of them."""
    tensors = (t for path in between.at_rest(step) for t in adapter.slots[path].tensors.values())
    return [tensor for tensor in tensors if tensor.requires_grad]


def _idle(trainees: Sequence[Trainee]) -> list[nn.Parameter]:
    """What does not train in the step to come; the optimizers forget what they know of it."""
    found = []
    for trainee in trainees:
        for tensor in at_rest(trainee.adapter, trainee.between, trainee.step):
            trainee.optimizer.state.pop(tensor, None)
            found.append(tensor)
    return found


@contextmanager
def resting(tensors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let nothing ask for gradients of these."""
    try:
        for tensor in tensors:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)


def _num_labels(block: Sequence[Example]) -> int:
    return sum(e.num_trained for e in block)


def _clip(trainee: Trainee, total: _Totals) -> float:
    """Clip the gradients of one adapter together; returns their norm before.

    Raises:
        NonFiniteError: the loss or the norm is NaN or infinite.
    """
    trained = list(trainee.adapter.parameters())
    total_norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    norm, limit = total_norm.item(), trainee.settings.max_grad_norm or math.inf
    if norm > limit:  # below it the gradients stay as they are: a product with 1 costs as much
        clip_grads_with_norm_(trained, limit, total_norm)
    if math.isfinite(norm) and math.isfinite(total.loss):
        return norm
    broken = "gradient norm" if math.isfinite(total.loss) else "loss"
    rows, which = total.suspects or total.rows, "micro-batch" if total.suspects else "step"
    records = ", ".join(str(row + 1) for row in rows[:20])
    error = NonFiniteError(
        f"adapter {trainee.adapter.name!r}, step {trainee.step + 1}: the {broken} is not finite",
        problems=[
            f"loss {total.loss:.6g}, gradient norm {norm:.6g}, learning rate "
            f"{trainee.learning_rate:.3g}",
            f"records of the {which}, counted from 1: {records}",
        ],
        expected="finite numbers; the adapter is as it was before this step",
        mend="lower learning_rate, set max_grad_norm, or use dtype: float32",
    )
    error.rows, error.adapter = rows, trainee.adapter.name
    raise error


def _update(trainee: Trainee, total: _Totals, norm: float) -> StepResult:
    rate = trainee.learning_rate
    for group in trainee.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    trainee.optimizer.step()
    # A fused optimizer does not count its writes, and what is kept of a tensor goes by that count.
    torch.autograd.graph.increment_version(list(trainee.adapter.parameters()))
    trainee.step += 1
    trainee.between.after(trainee.step)
    trainee.optimizer.zero_grad(set_to_none=True)
    return StepResult(total.loss, norm, rate, total.tokens, total.labels)

"""One adapter's way through its data: which records come when, how far it is, what was best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorica.attach.attach import reshape
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.data.pack import batches
from lorica.errors import CheckpointError, NonFiniteError
from lorica.train.checkpoint import State
from lorica.train.engine import StepResult, Trainee
from lorica.train.optim import moments, set_moments

GROUP = 32
"""Where batches are padded, this many are sorted by length among each other."""


@dataclass
class Window:
    """What happened since the last logged step of one adapter. `seconds` are those of its steps."""

    nll: float = 0.0
    trained_tokens: int = 0
    tokens: int = 0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        self.nll += result.loss * result.trained_tokens
        self.trained_tokens += result.trained_tokens
        self.tokens += result.tokens
        self.learning_rate, self.grad_norm = result.learning_rate, result.grad_norm
        self.seconds += seconds

    @property
    def loss(self) -> float:
        return self.nll / self.trained_tokens if self.trained_tokens else math.nan

    @property
    def rate(self) -> float:
        return self.tokens / max(1e-9, self.seconds)


@dataclass
class Course:
    """How far one adapter has come.

    Attributes:
        trainee: the adapter and its optimizer.
        examples: its training records, encoded.
        held_out: its evaluation records, encoded; empty where there are none.
        group: batches that are sorted by length among each other; 1 leaves the order alone.
        origins: (file, line) of each training record, where known.
        best_loss, best_step, best: of the evaluations so far; `best` holds the tensors.
        stale: evaluations in a row without a better loss.
        stopped: why it ended before its last step, or None.
        failed: what was not finite, which ended it; None where all was well.
        joined: turns of the run before its first step.
        eval_loss: of the newest evaluation.
        last_loss: training loss of the newest logged window.
        tokens, trained_tokens: seen in all its steps.
        window: what happened since the last logged step.
    """

    trainee: Trainee
    examples: list[Example]
    held_out: list[Example]
    group: int = 1
    origins: Sequence[tuple[str, int]] = ()
    best_loss: float | None = None
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    stopped: str | None = None
    failed: str | None = None
    joined: int = 0
    eval_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    trained_tokens: int = 0
    window: Window = field(default_factory=Window)

    def __post_init__(self) -> None:
        self._lengths = [len(e.input_ids) + len(e.labels) for e in self.examples]
        self._batches: tuple[int, list[list[int]]] = (-1, [])

    @property
    def name(self) -> str:
        return self.trainee.adapter.name

    @property
    def settings(self) -> TrainSettings:
        return self.trainee.settings

    @property
    def step(self) -> int:
        return self.trainee.step

    @property
    def per_step(self) -> int:
        """Records per optimizer step; the last step of an epoch may have fewer."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.per_step)

    @property
    def done(self) -> bool:
        return bool(self.stopped or self.failed) or self.step >= self.trainee.total

    @property
    def ended(self) -> str | None:
        """Why it does not train any more; None where it does."""
        if self.failed or self.stopped or not self.done:
            return self.failed or self.stopped
        return f"all {self.trainee.total} steps are done"

    def micro_batches(self) -> list[list[Example]]:
        """Those of the step to come: a function of seed and step, so nothing need be stored."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._batches[0] != epoch:
            how = {"batch_size": self.settings.batch_size, "group": self.group}
            made = batches(self._lengths, seed=self.settings.seed, epoch=epoch, **how)
            self._batches = epoch, made
        number = self.settings.gradient_accumulation_steps
        chosen = self._batches[1][place * number : (place + 1) * number]
        seed = self.settings.seed
        return [[self.examples[i].drawn(seed, epoch) for i in batch] for batch in chosen]

    def due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the last one, happens now."""
        return self.step % every == 0 or self.step == self.trainee.total

    def add(self, result: StepResult, seconds: float) -> None:
        """Count a step."""
        self.window.add(result, seconds)
        self.tokens += result.tokens
        self.trained_tokens += result.trained_tokens

    def improves(self, eval_loss: float) -> bool:
        """Whether an evaluation is better than all before it, of those that count."""
        settled = self.trainee.between.settled(self.step)
        return settled and (self.best_loss is None or eval_loss < self.best_loss)

    def judge(self, eval_loss: float) -> bool:
        """Take an evaluation; whether it is the best so far. It may end the course. Until the
        method has settled on a form, it does neither.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        if not math.isfinite(eval_loss):
            raise NonFiniteError(
                f"adapter {self.name!r}, step {self.step}: the evaluation loss is not finite "
                f"({eval_loss})",
                mend="lower learning_rate, or use dtype: float32",
            )
        self.eval_loss = eval_loss
        if not self.trainee.between.settled(self.step):
            return False
        if self.improves(eval_loss):
            self.best_loss, self.best_step, self.stale = eval_loss, self.step, 0
            self.best = {n: p.detach().clone() for n, p in self._named().items()}
            return True
        self.stale += 1
        patience = self.settings.early_stopping_patience
        if patience and self.stale >= patience:
            self.stopped = (
                f"the evaluation loss has not fallen for {patience} evaluations "
                f"(best at step {self.best_step})"
            )
        return False

    @property
    def keeps_best(self) -> bool:
        return self.settings.keep_best and bool(self.best)

    def finish(self) -> str | None:
        """Put the best tensors into the adapter, where that is wanted and there are any, and give
        it the form in which the method leaves it; returns what is left where that is less.
        """
        if self.keeps_best:
            self._set(self.best)
        if (form := self.trainee.between.finished()) is None:
            return None
        adapter, (method, held) = self.trainee.adapter, form
        before = len(adapter.slots)
        reshape(adapter, method, held)
        size = f"{adapter.num_parameters:,} parameters in {len(adapter.slots)} of {before} places"
        return f"{self.name}: {method.kind} leaves {size}"

    # what goes into a checkpoint

    _COUNTED = (
        "best_loss",
        "best_step",
        "stale",
        "stopped",
        "failed",
        "joined",
        "eval_loss",
        "last_loss",
        "tokens",
        "trained_tokens",
    )

    @property
    def broken(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity."""
        return [name for name, p in self._named().items() if not torch.isfinite(p).all()]

    def save_into(self, state: State) -> None:
        """Everything that the course needs to go on.

        Raises:
            NonFiniteError: a tensor holds a NaN or an infinity, which no checkpoint shall keep.
        """
        named = self._named()
        if (broken := self.broken) and not self.failed:
            raise NonFiniteError(
                f"adapter {self.name!r}, step {self.step}: {len(broken)} tensors are not finite",
                problems=broken[:5],
                mend="lower learning_rate or weight_decay",
            )
        counters: dict[str, Any] = {key: getattr(self, key) for key in self._COUNTED}
        state.counters[self.name] = {
            **counters,
            "step": self.step,
            "window": asdict(self.window),
        }
        state.adapters[self.name] = dict(named)
        if (
            not self.done or self.joined + self.step == state.step
        ):  # else it ended in an earlier turn
            state.optimizers[self.name] = moments(self.trainee.optimizer, named)
        if self.best:
            state.best[self.name] = self.best
        if between := self.trainee.between.state:
            state.between[self.name] = dict(between)

    def restore(self, state: State) -> None:
        """Go on from what `save_into` gave.

        Raises:
            CheckpointError: the tensors there are not those of this adapter.
        """
        named, counters = self._named(), state.counters[self.name]
        for group in (state.adapters[self.name], state.best.get(self.name, named)):
            if group.keys() != named.keys():
                raise CheckpointError(
                    f"the checkpoint of {self.name!r} holds other tensors than the adapter"
                )
        self._set(state.adapters[self.name])
        set_moments(self.trainee.optimizer, named, state.optimizers.get(self.name, {}))
        self.trainee.step = counters["step"]
        for key in self._COUNTED:
            setattr(self, key, counters[key])
        self.window = Window(**counters["window"])
        between, device = state.between.get(self.name, {}), next(iter(named.values())).device
        self.trainee.between.state = {key: t.to(device) for key, t in between.items()}
        best = state.best.get(self.name, {})
        self.best = {key: tensor.to(named[key].device) for key, tensor in best.items()}

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.trainee.adapter.named_parameters())

    @torch.no_grad()
    def _set(self, tensors: dict[str, Tensor]) -> None:
        for key, parameter in self._named().items():
            parameter.copy_(tensors[key])

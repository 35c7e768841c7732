"""What lies at a site: the adapters put there, and the route that says which of them act.

It is plain data in the `__dict__` of the module and not in the module tree: context variables break
compiled graphs, and autograd's own threads do not carry them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.gates import Gates
from lorica.errors import ActivationError, LoricaWarning
from lorica.methods.method import Layer, Method


@dataclass(eq=False)
class Slot:
    """What one adapter holds at one site."""

    method: Method
    tensors: dict[str, nn.Parameter]
    rests: bool = False
    """Whether another adapter trains on top of it: it acts as it does in use."""

    @property
    def dropout(self) -> float:
        """The share of its inputs that it drops in training."""
        return 0.0 if self.rests else self.method.dropout


@dataclass(frozen=True, eq=False)
class Route:
    """Which adapters act on which rows. One object is shared by all sites of an activation.

    Attributes:
        names: the adapters that take part, in the order of the columns of `weights`.
        weights: None where the one adapter of `names` acts on all rows with weight 1; (N,) for a
            mixture on all rows; (rows, N) for one mixture per row of the batch.
        segments: instead of weights, for training: (start, end, name) over the rows of the
            flattened batch.
        kept: the same over the rows that go on behind the attention of the last layer, where those
            are fewer.
        dropout_seed: makes the adapters' dropout repeatable; None draws from torch's global state.
        seeds: the same for each segment, where there are segments.
        stacked: at every place the adapters follow each other in the order of `names`, each given
            what the one before made of the output; else all are given the base's, and are added.
    """

    names: tuple[str, ...]
    weights: Tensor | None = None
    segments: tuple[tuple[int, int, str], ...] | None = None
    kept: tuple[tuple[int, int, str], ...] | None = None
    dropout_seed: int | None = None
    seeds: tuple[int, ...] = ()
    stacked: bool = False

    @cached_property
    def table(self) -> list[list[float]]:
        """The weights as numbers: one list for all rows, or one for each."""
        assert self.weights is not None
        found = self.weights.tolist()
        return found if self.weights.dim() == 2 else [found]


@dataclass(eq=False)
class Status:
    """What all sites of one model share.

    Attributes:
        decided: whether anybody has said what is to act. Until then a forward pass warns: an
            adapter that sits on a model without effect is the mistake that nobody sees.
        owner: the thread that activated; another one would change its answers.
        tokens: rows times positions that the newest layer with a batch was given.
        prompts: how long the prompts of the batch are, if a task told it; see `base.batch`.
        where: by adapter, the tokens whose hidden states it edits in this forward pass.
        gates: the texts of this forward pass, and what gates said of them; None where nothing has
            told them.
        schedule: what changes the weights from step to step; see `attach.weights`.
    """

    decided: bool = False
    owner: int | None = None
    tokens: int = 0
    prompts: Sequence[int] | None = None
    where: dict[str, Tensor] = field(default_factory=dict)
    gates: Gates | None = None
    schedule: Any = None

    def __getstate__(self) -> dict[str, Any]:  # a copy is inactive, and nobody's
        plain = {"decided": False, "owner": None, "tokens": 0, "schedule": None}
        return {**plain, "prompts": None, "where": {}, "gates": None}

    def warn_undecided(self) -> None:
        """Warn, once, that nothing acts because nobody said that anything should."""
        if self.decided or torch.compiler.is_compiling():
            return
        self.decided = True
        warnings.warn(
            "adapters are attached to this model but none was activated, so it answers as its base "
            "does; call lorica.activate(model, NAME), or lorica.activate(model, None) if that is "
            "meant",
            LoricaWarning,
            stacklevel=4,
        )


@dataclass(eq=False)
class Plates:
    """The adapters of one site, and the route that is in force."""

    path: str
    layer: Layer
    status: Status
    slots: dict[str, Slot] = field(default_factory=dict)
    guided: bool = False
    """Whether a pipeline that guides gives every row twice: all without the prompt, then all."""
    route: Route | None = None
    last: Route | None = None
    """The route of the newest forward pass: what tells sites that were passed by."""
    recorded: tuple[Route | None] | None = None
    """The route of the newest forward pass that autograd recorded; None before there was one."""

    def __getstate__(self) -> dict[str, Any]:  # a copy starts inactive
        return {**self.__dict__, "route": None, "last": None, "recorded": None}

    def acting(self) -> list[str]:
        """Names of the adapters that sit here and take part in the route."""
        return [n for n in self.route.names if n in self.slots] if self.route is not None else []

    def note_visit(self) -> None:
        """Remember the route of this pass; refuse a recomputation that runs under another one.

        A pass without gradients in between, such as that of a reference model, does not count.
        Reentrant checkpointing runs its own forward pass so, and nothing is recorded then: the
        newest pass counts.
        """
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            self.last = self.route
            if torch.is_grad_enabled():
                self.recorded = (self.route,)
        elif (self.recorded[0] if self.recorded else self.last) is not self.route:
            raise ActivationError(
                f"{self.path} was recomputed in the backward pass under another activation than "
                "its forward pass",
                mend="run backward inside the same activate(...) as the forward pass",
            )

    def to(self, device: torch.device) -> None:
        """Follow the base to a device; not to meta, where the tensors' values would be lost."""
        if device.type == "meta":
            return
        for slot in self.slots.values():
            for tensor in slot.tensors.values():
                if tensor.device != device:  # an optimizer keeps its objects
                    tensor.data = tensor.data.to(device)


def plates_of(module: nn.Module) -> list[Plates]:
    """The plates of one module: one for a forward site, one per parameter for a weight site."""
    own = module.__dict__
    return [own["_lorica"]] if "_lorica" in own else list(own.get("_lorica_weights", {}).values())

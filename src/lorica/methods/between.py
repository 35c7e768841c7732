"""What a method does between the optimizer steps of one adapter: as a rule nothing.

A method that acts there has a function `between(held, total=..., seed=...)`, which makes an object
of this class for a run. The engine asks it before every step what rests and whether the loss has a
part of its own, and calls it after the optimizer, while the gradients are still there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

from torch import Tensor

from lorica.methods.method import Method, Tensors

Held: TypeAlias = Mapping[str, tuple[Method, Mapping[str, Tensor]]]
"""What an adapter holds: path of a place -> the settings and the tensors there."""


class Between:
    """Does nothing. A method's own class overrides what it needs.

    Attributes:
        state: tensors by name that are kept from step to step. They are part of every checkpoint;
            all else must follow from the arguments of `between` and from the number of the step.
    """

    def __init__(self) -> None:
        self.state: Tensors = {}

    def problems(self) -> list[str]:
        """Why a run cannot go so; empty where it can."""
        return []

    def note(self) -> str | None:
        """What the user should know of the run."""
        return None

    def at_rest(self, step: int) -> Collection[str]:
        """The places that do not train in the step to come, after `step` of them. They get no
        gradients, and the optimizer forgets what it knows of them.
        """
        return ()

    def penalty(self) -> Tensor | None:
        """A part of the loss that depends on the adapter's tensors alone; added once in a step."""
        return None

    def after(self, step: int) -> None:
        """Called when `step` steps are done; the gradients of the last are those that the
        optimizer was given.
        """

    def settled(self, step: int) -> bool:
        """Whether the adapter has its final form by now. Before, no evaluation decides what is
        best, nor ends the run.
        """
        return True

    def kept_bytes(self) -> int:
        """How much `state` will take, for the estimate of a run's memory."""
        return 0

    def finished(self) -> tuple[Method, Held] | None:
        """The settings of the adapter when the run is over, and what its places hold, where that
        changes; where nothing is held, nothing stays.
        """
        return None

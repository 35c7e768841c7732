"""The handle of an adapter on a model, and the model's record of the adapters that it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorica.attach.plates import Slot, Status
from lorica.attach.survey import unwrap
from lorica.errors import ConfigError, nearest
from lorica.methods.method import Method

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(eq=False)
class Adapter:
    """The handle of an adapter on a model: the door to what trains.

    Attributes:
        name: its name on this model.
        method: the settings that made it.
        slots: what it holds, by place: a module's path, or that of a parameter.
        reason: why it sits where it sits.
        base: what is known of the base it was made on (name, digest, task), for its files.
        began_from: the adapter whose tensors were its start, for its files; empty without one.
        model: the model that it was put on, whose module names its files need.
        on: the adapter that it was put on top of: acting wherever this one acts.
        together: whether that one trains with this one; otherwise it is frozen.
        stacked: whether this one is given what that one made of a layer's output; otherwise both
            are given the base's, and what they add is summed.
        comes_along: whether it was read together with the adapter on top of it, and goes with that.
        noted: what its files said of it beside settings and tensors.
    """

    name: str
    method: Method
    slots: dict[str, Slot]
    model: nn.Module = field(repr=False)
    reason: str = ""
    base: dict[str, str] = field(default_factory=dict)
    began_from: dict[str, str] = field(default_factory=dict)
    on: Adapter | None = None
    together: bool = False
    stacked: bool = False
    comes_along: bool = False
    noted: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[Adapter]:
        """What acts with it, the lowest first, and itself."""
        return [*(self.on.stages if self.on is not None else []), self]

    @property
    def parts(self) -> list[Adapter]:
        """What trains as one adapter: those that train together with it, and itself, the last."""
        return [*(self.on.parts if self.on is not None and self.together else []), self]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and tensor of everything that trains, in the order of the model."""
        if self.on is not None and self.together:
            yield from ((f"on/{key}", tensor) for key, tensor in self.on.named_parameters())
        for path, slot in self.slots.items():
            for key, tensor in slot.tensors.items():
                if tensor.requires_grad and not tied_to(slot):
                    yield f"{path}.{key}", tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer is given."""
        return (tensor for _, tensor in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters())

    def __repr__(self) -> str:
        size = f"{len(self.slots)} places, {self.num_parameters:,} parameters"
        return f"Adapter({self.name!r}, {self.method.kind}, {size})"


@dataclass(eq=False)
class Attached:
    """Everything that attaching left on a model; kept in the root module's `__dict__`."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    unfrozen: list[str] = field(default_factory=list)
    """Base parameters that required gradients before the first adapter came."""
    held: list[nn.Module] = field(default_factory=list)
    """Layers that another library would pack anew; see `base.foreign`."""


def tied_to(slot: Slot) -> str | None:
    """The place whose tensors these are, where two layers share one weight."""
    return getattr(slot.method, "tied_to", None)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name, in the order in which they came."""
    return dict(attached_to(model).adapters)


def find(model: nn.Module, adapter: str | Adapter) -> Adapter:
    """The handle of an adapter by name or handle. Raises ConfigError with the nearest name."""
    name = adapter.name if isinstance(adapter, Adapter) else adapter
    known = attached_to(model).adapters
    if name not in known:
        near = nearest(str(name), known)
        there = ", ".join(known) or "none"
        raise ConfigError(
            f"no adapter {name!r} is attached to this model",
            expected=f"one of: {there}",
            mend=f"did you mean {near!r}?" if near else None,
        )
    return known[name]


def attached_to(model: nn.Module) -> Attached:
    """The record of what sits on `model`; a fresh one where nothing does."""
    return unwrap(model).__dict__.get("_lorica_attached") or Attached()


def check_name(name: str, attached: Attached) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of an adapter",
            expected="letters, digits, '.', '_' and '-', at most 64 of them",
        )
    if name in attached.adapters:
        raise ConfigError(
            f"an adapter {name!r} is attached already",
            mend="choose another name, or detach it first",
        )

"""Which layers a forward pass calls, and whose weight other code reads: found out by running it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Visit:
    """How often one layer was called, and how often its weight was read by others."""

    calls: int = 0
    reads: int = 0

    @property
    def kind(self) -> str:
        """ "called", "read", "both" or "never"."""
        return {(True, False): "called", (False, True): "read", (True, True): "both"}.get(
            (self.calls > 0, self.reads > 0), "never"
        )


def probe(
    model: nn.Module, run: Callable[[], object], modules: dict[str, nn.Module]
) -> dict[str, Visit]:
    """Run the model once and count calls and outside reads of the weight for each module.

    Args:
        run: runs one forward pass of `model`.
        modules: the layers to watch, by path. None of them may be a site.

    A read of `.weight` while the layer itself is running is its own; a read in which nothing but an
    attribute such as `dtype` is asked counts as a read too, so "both" means: look closer.
    """
    visits = {path: Visit() for path in modules}
    classes: dict[nn.Module, type] = {module: type(module) for module in modules.values()}
    for path, module in modules.items():
        module.__class__ = _watching(type(module), visits[path])
    try:
        with torch.no_grad():
            run()
    finally:
        for module, original in classes.items():
            module.__class__ = original
    return visits


def _watching(base: type[nn.Module], visit: Visit) -> type:
    inside = 0

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        nonlocal inside
        visit.calls += 1
        inside += 1
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            inside -= 1

    def weight(self: nn.Module) -> object:
        visit.reads += inside == 0
        if "weight" in self._parameters:
            return self._parameters["weight"]
        computed: Any = base.weight  # by a parametrization
        return computed.fget(self)

    return type(base.__name__, (base,), {"forward": forward, "weight": property(weight)})

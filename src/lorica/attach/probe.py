"""Which layers are called and which only have their weights read; and who was passed by.

A layer whose weight is read by other code never runs its own forward, so an adapter that adds to
its output is silently without effect. `weight_read` knows the places in torch and transformers
where that happens; `probe` finds out by running the model once; `unvisited` names, after a forward
pass, the sites that it missed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica.attach.site import plates_of


_NUMBER = re.compile(r"\d+")


def weight_read(parent: nn.Module | None, name: str) -> bool:
    """Whether `parent` reads the weight of its child `name` instead of calling the child.

    Known places: the output projection of `nn.MultiheadAttention`; the two linear layers of
    `nn.TransformerEncoderLayer`, which its fast path in evaluation reads; the step projection and
    the convolution of Mamba mixers, which fused kernels read.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return name == "out_proj"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return name in ("linear1", "linear2")
    return "Mamba" in type(parent).__name__ and name in ("dt_proj", "conv1d")


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


def unvisited(model: nn.Module) -> list[str]:
    """After a forward pass in eager mode under `activate`: the acting places that it passed by.

    Experts are judged together, since the tokens decide which of them is called.
    """
    acting = [p for m in model.modules() for p in plates_of(m) if p.acting()]
    called = {_NUMBER.sub("*", p.path) for p in acting if p.last is p.route}
    return [
        p.path
        for p in acting
        if p.last is not p.route
        and not ("expert" in p.path and _NUMBER.sub("*", p.path) in called)
    ]


@contextlib.contextmanager
def _routes(model: nn.Module, routes: list) -> Iterator[None]:
    places = [p for m in model.modules() for p in plates_of(m)]
    before = [(p.route, p.recorded) for p in places]
    for place, route in zip(places, routes, strict=True):
        place.route, place.recorded = route, (route,)
    try:
        yield
    finally:
        for place, (route, recorded) in zip(places, before, strict=True):
            place.route, place.recorded = route, recorded


def checkpoint_contexts(
    model: nn.Module,
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """The `context_fn` of `torch.utils.checkpoint(use_reentrant=False)`.

    The recomputation in the backward pass then runs under the routes of its forward pass, whatever
    is active by then.
    """
    return contextlib.nullcontext(), _routes(
        model, [p.route for m in model.modules() for p in plates_of(m)]
    )

"""Which adapters go through one pass of the base, and how the rows of it are routed to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lorica.attach.handle import Adapter
from lorica.attach.plates import Route, plates_of
from lorica.attach.site import is_site

MOST_TOKENS = 4096
"""Of a pass that adapters share. A pass of more is no faster per token, and takes more memory; how
a step is cut into passes changes no bit of any adapter.
"""


def groups_of(model: nn.Module, adapters: Sequence[Adapter], *, shares: bool) -> list[list[int]]:
    """Who may go through one pass with whom and still train to the same bits as alone, by number.

    Nobody where the base draws random numbers for the whole row, or where its output head is
    adapted (it sees labelled rows only). Not an adapter whose method does not stack on linear
    layers, or that lies on top of another one.

    Args:
        shares: whether the task lets adapters share a pass.
    """
    numbers = range(len(adapters))
    if len(adapters) == 1 or not shares or draws(model):
        return [[i] for i in numbers]
    if is_site(model.get_output_embeddings()):  # type: ignore[operator]
        return [[i] for i in numbers]
    sharing = _sharing(model, adapters)
    together = [i for i in numbers if adapters[i].name in sharing]
    return [group for group in [together, *([i] for i in numbers if i not in together)] if group]


def _sharing(model: nn.Module, adapters: Sequence[Adapter]) -> set[str]:
    """Names of the adapters whose arithmetic is that of segments of rows."""
    elsewhere = {
        name
        for module in model.modules()
        if is_site(module)
        for plates in plates_of(module)
        if plates.layer.kind != "linear"
        for name in plates.slots
    }
    return {
        adapter.name
        for adapter in adapters
        if adapter.name not in elsewhere
        and not adapter.on
        and all(slot.method.stacks for slot in adapter.slots.values())
    }


def passes_of(present: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
    """Those who share, cut into passes of at most `MOST_TOKENS`, or of one adapter."""
    passes: list[list[int]] = []
    room = 0
    for index, size in zip(present, tokens, strict=True):
        if size > room or not passes:
            passes.append([])
            room = MOST_TOKENS
        passes[-1].append(index)
        room -= size
    return passes


_OF_HEADS = ("classifier", "summary", "qa", "seq_classif")
"""Beginnings of settings of dropout in heads, where that is a module; most models have another."""


def draws(model: nn.Module) -> bool:
    """Whether the base itself uses dropout in training."""
    layers = any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())
    config: Any = getattr(model, "config", None)
    values = vars(config.get_text_config()) if config is not None else {}
    return layers or any(
        "drop" in name and not name.startswith(_OF_HEADS) and isinstance(value, float) and value > 0
        for name, value in values.items()
    )


def named_ranges(
    ranges: Sequence[tuple[int, int]], names: Sequence[str]
) -> tuple[tuple[int, int, str], ...]:
    """Ranges of rows with the adapters that they belong to."""
    return tuple((start, end, name) for (start, end), name in zip(ranges, names, strict=True))


def route_of(adapter: Adapter, *, dropout_seed: int) -> Route:
    """The route of an adapter that has a pass for itself, with what lies below it."""
    names, weights = tuple(stage.name for stage in adapter.stages), None
    if len(names) > 1:
        weights = torch.ones(len(names), device=next(adapter.parameters()).device)
    stacked = any(stage.stacked for stage in adapter.stages)
    return Route(names, weights, dropout_seed=dropout_seed, stacked=stacked)

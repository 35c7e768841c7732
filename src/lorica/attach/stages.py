"""Adapters that lie on top of each other: what was trained before stays, and acts below.

Everything an adapter does is an update beside the base, so the updates of all stages are added. The
lower ones are frozen, and act as they do in use: without dropout. Where they train together, both
are parts of one adapter of several methods, such as a prefix and a parallel bottleneck: He et al.
2022, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).

Stacked adapters follow each other instead: at every place the upper one is given what the lower one
made of the layer's output. Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task
Cross-Lingual Transfer" (arXiv 2005.00052) put an adapter of a task on that of a language so. For
methods that look at a layer's input alone, as LoRA, there is no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorica.attach.gates import is_gated
from lorica.attach.handle import Adapter
from lorica.attach.intervene import is_intervention
from lorica.attach.prompt import is_prompt
from lorica.errors import ConfigError
from lorica.methods.method import Method


def lay_on(adapter: Adapter, below: Adapter, together: bool, stacked: bool = False) -> None:
    """Let an adapter lie on top of another one of its model, which is frozen from now on, or trains
    together with it.
    """
    adapter.on, adapter.together, adapter.stacked = below, together, stacked
    if not together:
        let_rest(below, True)


def let_rest(adapter: Adapter, rests: bool) -> None:
    """Freeze an adapter that another one lies on; or let it train again."""
    for slot in adapter.slots.values():
        slot.rests = rests
        for key, tensor in slot.tensors.items():
            tensor.requires_grad_(not rests and key not in slot.method.frozen)


def check_union(method: Method, below: Adapter | None, together: bool) -> None:
    """Raises ConfigError where an adapter of this method and `below` cannot train together."""
    if not together:
        return
    if below is None:
        raise ConfigError(
            "together=True has no effect without an adapter to train together with",
            mend="name it: on=...",
        )
    if any(slot.rests for slot in below.slots.values()):
        raise ConfigError(
            f"{below.name!r} is frozen below another adapter, so it cannot train with this one",
            mend="detach that first",
        )
    busy = [one.kind for one in (below.method, method) if hasattr(one, "between")]
    if busy:
        raise ConfigError(
            f"{busy[0]} acts between the steps of its own training, so it trains alone",
            mend="train it first, and this one on top of it: together=False",
        )


def check_stack(below: Adapter | None, stacked: bool) -> None:
    """Raises ConfigError where an adapter cannot be stacked on `below`, or not laid on it."""
    if stacked and below is None:
        raise ConfigError(
            "stacked=True has no effect without an adapter to follow", mend="name it: on=..."
        )
    if below is not None and below.on is not None and below.stacked != stacked:
        how = "stacked" if below.stacked else "added"
        raise ConfigError(
            f"{below.name!r} and what lies below it are {how}, and so must be what comes on top",
            mend=f"give stacked={below.stacked}",
        )


def check_stages(method: Method, below: Adapter | None) -> None:
    """Raises ConfigError where an adapter of this method cannot lie on `below`."""
    check_methods(method, [stage.method for stage in below.stages] if below is not None else ())


def check_methods(method: Method, lower: Sequence[Method]) -> None:
    """Raises ConfigError where a method cannot act on top of the others."""
    every = [*lower, method]
    gated = next((one.kind for one in every if is_gated(one)), None)
    inserted = next((one.kind for one in every if hasattr(one, "embeddings")), None)
    if gated and inserted:
        raise ConfigError(
            f"{gated} and {inserted} do not act together: a gate looks at the tokens that the "
            "model was given, and virtual tokens would be among them",
            mend="use prefix-tuning, whose virtual tokens are keys and values alone",
        )
    if not (is_prompt(method) or is_intervention(method)):
        return
    taken = [one for one in lower if is_prompt(one)]
    if taken and is_prompt(method):
        raise ConfigError(
            f"{method.kind} cannot be trained on top of {taken[0].kind}: virtual tokens stand "
            "before a row once",
            expected="at most one adapter with virtual tokens among those that act together",
            mend="train another method on top of it, or go on with its own tensors: init_adapter",
        )
    edits = [one for one in lower if is_intervention(one)]
    if other := (edits if is_prompt(method) else taken):
        raise ConfigError(
            f"{method.kind} cannot be trained on top of {other[0].kind}: edits of hidden states "
            "and virtual tokens do not go together",
            mend="train another method on top of it",
        )

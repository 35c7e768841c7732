"""The door to everything that records decide about an adapter before it trains.

A method sees no data, so what it needs from records is chosen here, by the function that CHOOSERS
has for it, and attached as tensors that exist already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorica.attach.attach import attach_tensors
from lorica.attach.handle import Adapter
from lorica.attach.layers import describe
from lorica.attach.places import Places, places_of
from lorica.attach.survey import unwrap
from lorica.base.foreign import as_stored
from lorica.data.encode import Example
from lorica.errors import ConfigError
from lorica.methods.lora import LoRA
from lorica.methods.method import Method, Tensors
from lorica.methods.sparse import Sparse
from lorica.tasks.task import Task
from lorica.train import eva, importance, lora_ga
from lorica.train.choice import Answer, Question, Relevance
from lorica.train.seed import derive_seed

CHOOSERS: dict[str, Callable[[Question], Answer]] = {
    "sparse": importance.choose,
    "eva": eva.choose,
    "lora_ga": lora_ga.choose,
}
"""What is chosen -> by which function."""


def attach_by_records(
    model: nn.Module,
    method: Method,
    task: Task,
    examples: Sequence[Example],
    *,
    name: str = "default",
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> tuple[Adapter, Relevance]:
    """Put an adapter on `model` of which records decide something: the entries of a `Sparse`, the
    start of a `LoRA` with init_lora_weights="eva" or "lora_ga".

    The base stays as it is, and the adapter begins as the identity.

    Args:
        method: what is chosen, and from how many records.
        task: what the loss is.
        examples: encoded records; some of them are drawn with `seed`.
        between: called before every record; may raise to leave.

    Raises:
        TargetError: as `attach` does. The model is unchanged.
        ConfigError: there are no records, or too few; the settings leave nothing to choose; or
            nothing about this method is chosen from records.
        NonFiniteError: a gradient or an input is NaN or infinite.
        BaseModelError: as `attach`.
    """
    model = unwrap(model)
    chooser = CHOOSERS[_word(method)]
    with as_stored(model):
        places, whole, reason = places_of(model, method)
        own = {path: place for path, place in places.items() if place[2].kind == whole.kind}
        settings: Any = whole
        drawn = _draw(examples, settings.num_records, seed) if settings.needs_records else []
        if settings.needs_records and not drawn:
            raise ConfigError(
                f"these settings of {whole.kind} need records to choose by, and there are none"
            )
        layers = {path: describe(module, parameter) for path, (module, parameter, _) in own.items()}
        answer = chooser(Question(model, own, layers, whole, task, drawn, seed, between))
    tensors: dict[str, Tensors] = {}
    final: Places = {}
    for path, (module, parameter, at_place) in places.items():
        if path not in own:
            final[path] = module, parameter, at_place
            tensors[path] = at_place.start(describe(module, parameter), torch.Generator())
        elif path in answer.own:
            final[path] = module, parameter, answer.own[path]
            tensors[path] = answer.tensors[path]
    found = replace(answer.relevance, num_records=len(drawn))
    reason = f"{reason}; {found}"
    return attach_tensors(model, answer.method, final, tensors, name=name, reason=reason), found


def _word(method: Method) -> str:
    """The key of CHOOSERS."""
    if isinstance(method, Sparse):
        return "sparse"
    word = str(method.init_lora_weights) if isinstance(method, LoRA) else method.kind
    if word not in CHOOSERS:
        raise ConfigError(
            f"nothing about {method.kind} with these settings is chosen from records",
            expected="sparse, or LoRA with init_lora_weights=eva or lora_ga",
            mend="use lorica.attach(model, method)",
        )
    return word


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "relevance"))
    order = torch.randperm(len(examples), generator=generator)[:count].sort().values
    return [examples[i] for i in order.tolist()]

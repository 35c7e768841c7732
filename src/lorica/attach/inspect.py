"""What a model holds, and what each choice of targets would train. Plain data; the CLI prints it.

Sizes are read off shapes, so a model on the meta device (its config alone) will do.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lorica.attach.choices import CHOICES
from lorica.attach.survey import Place, Survey, suffix_of, survey
from lorica.attach.targets import Targets, resolve
from lorica.base.storage import num_parameters
from lorica.errors import ConfigError, TargetError


@dataclass(frozen=True)
class Group:
    """Places of one name, class, part and shape.

    Attributes:
        suffix: the name that would target them, for example "q_proj".
        kind: the class of the layer, or of the module that holds the weight.
        role: the part it plays: "attention", "mlp", "mixer", "experts", "embedding", "convolution",
            "outside" (of the repeated blocks), "head" or "router".
        shape: of the weight: (out, in); an embedding (vocabulary, width); a convolution (out,
            in / groups, *kernel); expert weights as stored.
        count: how many there are.
        num_parameters: of all of them, biases included; what they share counts in each.
        example: the path of the first one.
    """

    suffix: str
    kind: str
    role: str
    shape: tuple[int, ...]
    count: int
    num_parameters: int
    example: str


@dataclass(frozen=True)
class ChoiceReport:
    """What one choice of targets would train with LoRA.

    Attributes:
        choice: "auto", "all-linear", "attention" or "mlp".
        reason: why these layers; for a choice that this model does not have, what is wrong.
        num_places: how many layers and weights get an adapter.
        num_parameters: how many parameters would train.
        percent: of the parameters of the model.
        suffixes: name -> how many.
        left_out: why -> the names that were passed by for it, with their numbers.
    """

    choice: str
    reason: str
    num_places: int
    num_parameters: int
    percent: float
    suffixes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What a model holds. `as_dict()` is fit for JSON.

    Attributes:
        model_class: the class of the model.
        model_type: `config.model_type`, or None.
        num_parameters: all parameters; a shared one counts once.
        num_trainable: those that require gradients now.
        num_modules: all modules.
        num_blocks: how many numbered blocks the longest list of layers has.
        groups: the layers that an adapter can sit on, in the order of the model.
        choices: what each choice would train.
        rank: the r that the choices were computed for.
        shared: sets of layers that hold one and the same Parameter.
        also: path -> further names of the same module.
        uncovered: parameters of at least 2 dimensions that no layer of `groups` owns -> shape.
    """

    model_class: str
    model_type: str | None
    num_parameters: int
    num_trainable: int
    num_modules: int
    num_blocks: int
    groups: tuple[Group, ...]
    choices: tuple[ChoiceReport, ...]
    rank: int
    shared: tuple[tuple[str, ...], ...]
    also: dict[str, list[str]]
    uncovered: dict[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: nn.Module, *, r: int = 8) -> Inspection:
    """Look at a model; nothing is run and nothing is changed.

    Args:
        model: any module, also on the meta device.
        r: the rank for which the choices are counted.

    Raises:
        ConfigError: r is not a positive whole number.
        TargetError: the model is wrapped by something that adapters cannot pass through.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"r is {r!r}", expected="a whole number of at least 1")
    found = survey(model)
    parameters = list(model.parameters())
    total = num_parameters(model)
    numbers = [p.layer for p in found.places.values() if p.layer is not None]
    return Inspection(
        model_class=type(found.modules[""]).__name__,
        model_type=found.model_type,
        num_parameters=total,
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        num_modules=len({id(module) for module in found.modules.values()}),
        num_blocks=max(numbers) + 1 if numbers else 0,
        groups=_groups(found),
        choices=tuple(_choice(model, found, choice, r, total) for choice in CHOICES),
        rank=r,
        shared=_shared(found),
        also={p.path: list(p.also) for p in found.places.values() if p.also},
        uncovered={path: place.shape for path, place in found.bare.items()},
    )


def lora_size(place: Place, r: int) -> int:
    """How many parameters LoRA of rank r trains at a place: A is (r, in), B is (out, r).

    An embedding and a matrix alike hold r (rows + columns). A convolution's A is an ungrouped
    convolution with the kernel, its B a grouped pointwise one, as PEFT has them. Every expert of a
    3-D weight has factors of its own.
    """
    shape, module = place.shape, place.module
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        kernel = math.prod(module.kernel_size)
        return r * module.in_channels * kernel + r // module.groups * module.out_channels
    if place.kind == "experts":
        return shape[0] * r * (shape[1] + shape[2])
    return r * (shape[0] + math.prod(shape[1:]))


def _groups(found: Survey) -> tuple[Group, ...]:
    groups: dict[tuple[str, str, str, tuple[int, ...]], list[Place]] = {}
    for place in found.places.values():
        key = suffix_of(place.path), type(place.module).__name__, place.role, place.shape
        groups.setdefault(key, []).append(place)
    return tuple(
        Group(*key, len(places), sum(_own_size(p) for p in places), places[0].path)
        for key, places in groups.items()
    )


def _own_size(place: Place) -> int:
    """Parameters of a place, from its sizes where a quantizer has packed the weight."""
    if place.parameter is not None:
        return math.prod(place.shape)
    bias = getattr(place.module, "bias", None)
    return math.prod(place.shape) + (bias.numel() if bias is not None else 0)


def _choice(model: nn.Module, found: Survey, choice: str, r: int, total: int) -> ChoiceReport:
    try:
        targets = resolve(model, target_modules=choice)
    except TargetError as error:
        return ChoiceReport(choice, "; ".join(error.problems), 0, 0, 0.0)
    places = [found.places[path] for path in targets.paths]
    size = sum(lora_size(place, r) for place in places)
    return ChoiceReport(
        choice,
        targets.reason,
        len(places),
        size,
        100 * size / total if total else 0.0,
        dict(Counter(suffix_of(place.path) for place in places)),
        _left_out(targets),
    )


def _left_out(targets: Targets) -> dict[str, dict[str, int]]:
    reasons: dict[str, Counter[str]] = {}
    for path, why in targets.left_out.items():
        reasons.setdefault(why, Counter())[suffix_of(path)] += 1
    return {why: dict(names) for why, names in reasons.items()}


def _shared(found: Survey) -> tuple[tuple[str, ...], ...]:
    sets = {tuple(sorted((p.path, *p.shared))) for p in found.places.values() if p.shared}
    return tuple(sorted(sets))

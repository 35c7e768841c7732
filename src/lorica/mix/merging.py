"""Merge adapters into their base: the only code that writes a base weight.

    W' = round(W + sum_i w_i (W_i - W))

W_i is the weight as adapter i alone would make it; for LoRA W_i - W = s B A. The sum is taken in
float32 (float64 for a float64 base) and rounded once, to the dtype of the base. The rounding is the
damage: a bfloat16 weight keeps 8 bits, and an update far below the last of them is lost. What is
lost is measured for every weight before the first of them is written; no second set of weights is
held for that, each is computed again when it is written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lorica.attach.activate import with_stages
from lorica.attach.attach import detach
from lorica.attach.handle import Adapter, adapters, find
from lorica.base.known import base_of
from lorica.base.quantize import dequantize_model, quantization_of
from lorica.errors import ConfigError, LoricaWarning, MergeError, folded
from lorica.methods.method import becomes_weight
from lorica.mix.report import MergeReport
from lorica.mix.target import Target, hindrance, measured, rounded, targets_of
from lorica.mix.tied import find_ties, untie
from lorica.mix.undo import Undo, keep_packed, keep_ties, write

WARN_DAMAGE, REFUSE_DAMAGE = 0.05, 0.25


def merge(
    model: nn.Module,
    mixture: str | Adapter | Mapping[str, float],
    *,
    force: bool = False,
    keep: bool = True,
    requantize: bool = False,
) -> MergeReport:
    """Write adapters into the base and take them off; the model answers as it did with them.

    The weights in memory change; files on the disk do not (`files.whole.save_merged` writes new
    ones). An input embedding that is tied to the output layer is untied where the model's config
    can say so; other shared weights are refused.

    Args:
        mixture: one adapter, or the weights of several: their updates are summed before the one
            rounding, with those of the adapters that they lie on.
        force: merge even where rounding destroys more than a quarter of the update.
        keep: keep the weights that are replaced, as long as the report is kept, so that its `undo`
            can put back their very bits.
        requantize: a quantized base stays quantized, and every merged weight is quantized again;
            else all layers of the model become plain ones, in the dtype that they stand for.

    Returns:
        the rounding damage of every weight. More than 5 % of it overall is a warning too.

    Raises:
        ConfigError: an unknown adapter or a weight that is no finite number.
        MergeError: an update has no weight to go to, shares one with others, or drowns in rounding.
            Nothing was written then.
    """
    shares = _shares(model, mixture)
    targets = list(targets_of(model, shares))
    apart = check_mergeable(model, shares, targets)
    unpacks = not requantize and quantization_of(model) is not None
    if unpacks:
        _check_alone(model, shares)
    known = base_of(model)
    undo = Undo(model, base=known) if keep else None
    entries = tuple(measured(target, requantize=requantize) for target in targets)
    report = MergeReport(shares, entries, tuple(apart), undo)
    judge_damage(report, force, requantize=requantize)
    if apart:
        if undo is not None:
            keep_ties(undo, model, list(apart))
        untie(model, apart)
    if undo is not None:
        keep_packed(undo, model)
    for name in reversed(adapters(model)):  # what lies on another one goes first
        if name in shares and (adapter := adapters(model).get(name)) is not None:
            gone = [a for a in adapter.stages if a.comes_along or a is adapter]
            detach(model, name)
            if undo is not None:
                left = adapters(model)
                undo.taken_off[:0] = [a for a in gone if a.name not in left]
    _write(targets, undo, requantize)
    if unpacks:
        dequantize_model(model)
    _forget_digest(model, shares)
    return report


def check_mergeable(
    model: nn.Module, shares: Mapping[str, float], targets: list[Target], *, held: bool = True
) -> dict[str, list[str]]:
    """The parameters that must be untied, each with all names of its tie.

    Args:
        held: whether the weights are in memory; they may lie on the disk alone.

    Raises:
        MergeError: all reasons why these adapters cannot become weights.
    """
    problems = _not_weights(model, shares)
    problems += [
        f"{name} is stacked on {stage.name}, and {stage.method.kind} is no sum of products"
        for name in shares
        if find(model, name).stacked
        for stage in find(model, name).stages
        if not all(slot.method.stacks or slot.method.replaces for slot in stage.slots.values())
    ]
    problems += [
        f"{name} lies below {other.name}, which would lose it; detach that, or merge it as well"
        for name in shares
        for other in adapters(model).values()
        if other.on is not None and other.on.name == name and other.name not in shares
    ]
    problems += folded((t.path, why) for t in targets if (why := hindrance(t, held)))
    apart, tied_problems = find_ties(model, targets)
    problems += tied_problems
    if problems:
        raise MergeError("these adapters cannot become weights", problems=problems[:20])
    return apart


def _check_alone(model: nn.Module, shares: Mapping[str, float]) -> None:
    """Raises MergeError where adapters would stay on layers whose storage changes."""
    others = [name for name in adapters(model) if name not in shares]
    if others:
        raise MergeError(
            f"merging makes a quantized base a plain one, and {', '.join(others)} sits on it",
            mend="detach the others first, merge them as well, or keep it quantized: "
            "requantize=True",
        )


def _write(targets: list[Target], undo: Undo | None, requantize: bool) -> None:
    """Every weight once, also where several layers share it."""
    written: set[int] = set()
    for target in targets:
        if id(target.parameter) not in written:
            written.add(id(target.parameter))
            new = rounded(target, requantize=requantize)
            write(undo, target.module, target.name, new, pack=requantize)


def _shares(model: nn.Module, mixture: str | Adapter | Mapping[str, float]) -> dict[str, float]:
    given = dict(mixture) if isinstance(mixture, Mapping) else {find(model, mixture).name: 1.0}
    problems = [
        f"the weight of {name!r} is {weight!r}; it must be a finite number"
        for name, weight in given.items()
        if isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not math.isfinite(weight)
    ]
    if problems or not given:
        raise ConfigError(
            "this mixture cannot be merged", problems=problems or ["it names no adapter"]
        )
    return with_stages(model, {find(model, n).name: float(w) for n, w in given.items()})


def _not_weights(model: nn.Module, shares: Mapping[str, float]) -> list[str]:
    """Adapters for which no weight makes the base answer as they do."""
    found = []
    for name in shares:
        slots = find(model, name).slots.values()
        stuck = {s.method.kind for s in slots if not becomes_weight(s.method)}
        found += [
            f"{name}: {kind} is no change of a weight; keep the adapter and load it beside the base"
            for kind in sorted(stuck)
        ]
    return found


def judge_damage(report: MergeReport, force: bool, *, requantize: bool = False) -> None:
    """Refuse what must not be written; warn of what was lost.

    Args:
        requantize: the weights are quantized again, which moves them by more than rounding does: as
            far as one step of the quantizer, however small the update.
    """
    bad = [
        w.path for w in report.merged if not math.isfinite(w.update) or not math.isfinite(w.damage)
    ]
    if bad:
        raise MergeError(
            "merged weights would not be finite",
            problems=bad[:20],
            mend="use smaller weights, or a base in bfloat16 or float32",
        )
    worst = sorted(report.merged, key=lambda w: -w.damage)[:5]
    lines = [f"{w.path} ({w.dtype}): {w.damage:.1%}" for w in worst]
    mend = "keep the adapter apart, or merge into the base in float32 and save that"
    if requantize:
        mend = "keep the adapter apart, or merge into plain numbers, without requantize"
    if report.damage > REFUSE_DAMAGE and not force:
        size = f"{report.damage:.0%} of the update"
        raise MergeError(
            f"quantizing again would be off by {size}"
            if requantize
            else f"rounding would destroy {size}",
            expected=f"at most {REFUSE_DAMAGE:.0%}",
            mend=f"{mend}; or pass force=True (--force)",
            problems=lines,
        )
    if report.damage > WARN_DAMAGE:
        size = f"{report.damage:.1%} of the update"
        what = (
            f"quantized again, it is off by {size}" if requantize else f"rounding destroyed {size}"
        )
        warnings.warn(
            f"{what}; worst: {lines[0]}; {mend}",
            LoricaWarning,
            stacklevel=3,
        )


def _forget_digest(model: nn.Module, shares: Mapping[str, float]) -> None:
    """The base is another one now: adapters made on it must not pass for those of the old one."""
    base = base_of(model)
    if base is not None:
        name = " + ".join([base.name, *shares])
        model.__dict__["_lorica_base"] = replace(base, name=name, digest="")

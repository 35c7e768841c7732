"""Merge adapters into their base: the only code that writes a base weight.

    W' = round(W + sum_i w_i (W_i - W))

W_i is the weight as adapter i alone would make it; for LoRA W_i - W = s B A. The sum is taken in
float32 (float64 for a float64 base) and rounded once, to the dtype of the base. The rounding is the
damage: a bfloat16 weight keeps 8 bits, and an update far below the last of them is lost. What is
lost is measured for every weight, and all weights are computed and checked before the first write.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import with_stages
from lorica.attach.attach import Adapter, adapters, attached_to, detach, find
from lorica.attach.layers import describe, to_stored
from lorica.attach.site import Slot
from lorica.attach.survey import clean, end_layer, survey
from lorica.base.load import base_of
from lorica.base.quantize import dequantize_model
from lorica.base.storage import hindrance, is_packed, read_weight, rounded_weight, write_weight
from lorica.errors import ConfigError, LoricaWarning, MergeError, folded
from lorica.methods.method import Layer, becomes_weight

WARN_DAMAGE, REFUSE_DAMAGE = 0.05, 0.25


@dataclass(frozen=True)
class MergedWeight:
    """What merging did to one weight.

    Attributes:
        path: of the parameter.
        shape, dtype: of the parameter.
        update: root mean square of the exact update.
        damage: root mean square of (rounded - exact) over `update`; 0 where there was no update.
        changed: share of the elements whose stored value changed.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    update: float
    damage: float
    changed: float


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        weights: adapter -> its weight in the mixture.
        merged: one entry per parameter, in the order of the adapters' places.
        untied: parameters that were tied before and have values of their own now.
    """

    weights: Mapping[str, float]
    merged: tuple[MergedWeight, ...]
    untied: tuple[str, ...] = ()

    @property
    def damage(self) -> float:
        """Root mean square of all rounding errors over that of all updates."""
        sizes = [math.prod(weight.shape) for weight in self.merged]
        update = sum(n * w.update**2 for n, w in zip(sizes, self.merged, strict=True))
        error = sum(n * (w.update * w.damage) ** 2 for n, w in zip(sizes, self.merged, strict=True))
        return math.sqrt(error / update) if update else 0.0

    def __str__(self) -> str:
        mixture = ", ".join(f"{name} x {weight:g}" for name, weight in self.weights.items())
        lines = [
            f"merged {mixture} into {len(self.merged)} weights; rounding damage {self.damage:.2%}"
        ]
        lines += [f"  untied: {path}" for path in self.untied]
        width = max((len(w.path) for w in self.merged), default=0)
        lines.append(
            f"  {'weight':<{width}}  {'dtype':<9} {'update':>9} {'damage':>8} {'changed':>8}"
        )
        lines += [
            f"  {w.path:<{width}}  {w.dtype:<9} {w.update:>9.2e} {w.damage:>8.2%} {w.changed:>8.1%}"
            for w in self.merged
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Target:
    """One parameter that the merge will write."""

    path: str
    module: nn.Module
    name: str
    parts: tuple[tuple[float, Slot], ...]
    layer: Layer

    @property
    def parameter(self) -> nn.Parameter:
        found = self.module._parameters[self.name]
        assert found is not None
        return found


def merge(
    model: nn.Module,
    mixture: str | Adapter | Mapping[str, float],
    *,
    force: bool = False,
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
        requantize: a quantized base stays quantized, and every merged weight is quantized again;
            else all layers of the model become plain ones, in the dtype of the base.

    Returns:
        the rounding damage of every weight. More than 5 % of it overall is a warning too.

    Raises:
        ConfigError: an unknown adapter or a weight that is no finite number.
        MergeError: an update has no weight to go to, shares one with others, or drowns in rounding.
            Nothing was written then.
    """
    shares = _shares(model, mixture)
    targets = list(_targets(model, shares))
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
    problems += folded((t.path, why) for t in targets if (why := _hindrance(t)))
    untie, tied_problems = _ties(model, targets)  # path -> all that share it
    problems += tied_problems
    if problems:
        raise MergeError("these adapters cannot become weights", problems=problems[:20])
    results = [_merged(target, requantize) for target in targets]
    report = MergeReport(shares, tuple(entry for _, entry in results), tuple(untie))
    _judge(report, force)
    if untie:
        _untie(model, untie)
    for name in reversed(adapters(model)):  # what lies on another one goes first
        if name in shares and name in adapters(model):
            detach(model, name)
    for target, (weight, _) in zip(targets, results, strict=True):
        write_weight(target.module, target.name, weight, pack=requantize)
    if not requantize and not adapters(model):
        dequantize_model(model)
    _forget_digest(model, shares)
    return report


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


def _targets(model: nn.Module, shares: Mapping[str, float]) -> Iterator[_Target]:
    """Every parameter that an adapter of the mixture changes."""
    modules = {clean(path): m for path, m in model.named_modules(remove_duplicate=False)}
    known = adapters(model)
    paths = dict.fromkeys(path for name in shares for path in known[name].slots)
    for path in paths:
        parts = tuple(
            (share, known[name].slots[path])
            for name, share in shares.items()
            if path in known[name].slots
        )
        if path in modules:
            module, parameter = modules[path], None
        else:
            core, _, parameter = path.rpartition(".")
            module = modules[core]
        layer = describe(module, parameter)
        own = [parameter or "weight"]
        own += [key for _, slot in parts if slot.method.replaces for key in slot.tensors]
        own += ["bias" for _, slot in parts if _scales_bias(slot)]
        for name in dict.fromkeys(own):
            if module._parameters.get(name) is None:
                continue
            acting = tuple(p for p in parts if name in p[1].tensors or not p[1].method.replaces)
            if name != own[0]:  # a copy may hold a bias; most of what adds, adds to the weight
                acting = tuple(p for p in acting if p[1].method.replaces or _scales_bias(p[1]))
            full = path if parameter else f"{path}.{name}" if path else name
            if not acting:  # a copy of other parameters of this layer
                continue
            yield _Target(full, module, name, acting, layer)


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


def _scales_bias(slot: Slot) -> bool:
    return hasattr(slot.method, "merged_bias")


def _hindrance(target: _Target) -> str | None:
    """Why an update cannot go into this weight."""
    parameter, layer = target.parameter, target.layer
    adds = [slot for _, slot in target.parts if not slot.method.replaces]
    copies = [(share, slot) for share, slot in target.parts if slot.method.replaces]
    if parameter.is_meta:
        return f"a weight of type {parameter.dtype} on {parameter.device} cannot be written"
    if text := hindrance(target.module, target.name):
        return text
    if "parametrizations" in target.module._modules:
        return "the weight is computed by a parametrization; remove it first"
    if adds and layer.geometry.get("groups", 1) > 1:
        return "the update of a grouped convolution is no grouped convolution itself"
    if adds and getattr(target.module, "max_norm", None) is not None:
        return "the embedding changes its own weight when it is read (max_norm)"
    if layer.kind in ("other", "block", "model") and [share for share, _ in copies] not in (
        [1.0],
        [],
    ):
        kind = type(target.module).__name__
        return f"a mixture of {kind} modules is no {kind}; give one adapter the weight 1"
    return None


def _merged(target: _Target, requantize: bool = False) -> tuple[Tensor, MergedWeight]:
    """The new weight, in the dtype of the base unless it is quantized again, and what rounding did
    to it.
    """
    parameter = read_weight(target.module, target.name).detach()
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    base = parameter.to(wide)
    update = torch.zeros_like(base)
    for share, slot in target.parts:
        update += _update(target, slot, base) * share
    exact = base + update
    if len(target.parts) == 1 and target.parts[0][0] == 1.0 and target.parts[0][1].method.replaces:
        exact = target.parts[0][1].tensors[target.name].detach().to(base)  # bit for bit
    packs = requantize and is_packed(target.module, target.name)
    rounded = exact.to(parameter.dtype)
    if packs:
        rounded = rounded_weight(target.module, exact)
    error = (rounded.to(torch.float64) - base.to(torch.float64)).sub_(update)
    size = _rms(update)
    entry = MergedWeight(
        target.path,
        tuple(parameter.shape),
        str(parameter.dtype).removeprefix("torch."),
        size,
        _rms(error) / size if size else 0.0,
        float((rounded != parameter).double().mean()),
    )
    return (exact if packs else rounded), entry


def _update(target: _Target, slot: Slot, base: Tensor) -> Tensor:
    """What one adapter adds to the weight, laid out as the module stores it."""
    if slot.method.replaces:
        return slot.tensors[target.name].detach().to(base) - base
    tensors = {key: tensor.detach().to(base) for key, tensor in slot.tensors.items()}
    if target.name != "bias" and hasattr(slot.method, "delta"):  # no detour by W, for its last bits
        delta: Any = slot.method.delta  # pyright: ignore[reportAttributeAccessIssue]
        return to_stored(target.module, target.name, delta(tensors, target.layer))
    if target.name == "bias":
        scaled: Any = slot.method  # by `_targets`
        return scaled.merged_bias(base, tensors, target.layer) - base
    plain = to_stored(target.module, target.name, base)
    merged = slot.method.merged(plain, tensors, target.layer)
    if merged is None:
        raise MergeError(f"{target.path}: {slot.method.kind} cannot become a weight here")
    return to_stored(target.module, target.name, merged) - base


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _judge(report: MergeReport, force: bool) -> None:
    """Refuse what must not be written; warn of what was lost."""
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
    if report.damage > REFUSE_DAMAGE and not force:
        raise MergeError(
            f"rounding would destroy {report.damage:.0%} of the update",
            expected=f"at most {REFUSE_DAMAGE:.0%}",
            mend=f"{mend}; or pass force=True",
            problems=lines,
        )
    if report.damage > WARN_DAMAGE:
        warnings.warn(
            f"rounding destroyed {report.damage:.1%} of the update; worst: {lines[0]}; {mend}",
            LoricaWarning,
            stacklevel=3,
        )


# --- shared weights -------------------------------------------------------------------------------


def _ties(model: nn.Module, targets: list[_Target]) -> tuple[dict[str, list[str]], list[str]]:
    """Parameters to untie, each with all names of the tie; and why others cannot be untied."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():  # a module under two names computes the same in both
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = clean(f"{path}.{name}" if path else name)
                owners.setdefault(id(parameter), []).append((full, module))
    idle = {f"{p.path}.weight" for p in survey(model).places.values() if p.shared and p.refusal}
    overlapping = _overlapping(model)
    untie: dict[str, list[str]] = {}
    problems: list[str] = []
    for target in targets:
        sharers = owners[id(target.parameter)]
        called = [path for path, _ in sharers if path not in idle]
        if len(sharers) > 1 and not _moves_as_one(target, targets, len(called)):
            others = ", ".join(path for path, _ in sharers if path != target.path)
            if _can_untie(model, [module for _, module in sharers]):
                untie[target.path] = [path for path, _ in sharers]
            else:
                problems.append(
                    f"{target.path}: its weight is also that of {others}, where the update does "
                    f"not belong, and {type(model).__name__} has no setting that unties them; keep "
                    "the adapter apart"
                )
        elif id(target.parameter) in overlapping:
            problems.append(f"{target.path}: its memory is shared with another parameter")
    return untie, problems


def _moves_as_one(target: _Target, targets: list[_Target], num_called: int) -> bool:
    """Whether every layer that is called with this weight gets the very same update, so that it
    stays shared.
    """
    together = [t for t in targets if t.parameter is target.parameter]
    updates = {tuple((share, id(slot.tensors)) for share, slot in t.parts) for t in together}
    return len(together) == num_called and len(updates) == 1


def _can_untie(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether these are the input embedding and the output layer, and only the config ties them.

    Encoder-decoder models tie four weights, and some scale their output by the tie: they stay.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or len(modules) != 2:
        return False
    if getattr(config, "is_encoder_decoder", False):
        return False
    ends = [end_layer(model, "get_input_embeddings"), end_layer(model)]
    return all(any(module is end for end in ends) for module in modules)


def _overlapping(model: nn.Module) -> set[int]:
    """Parameters that are different objects over the same memory."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), str(p.device), id(p))
        for p in model.parameters()
        if p.numel() and not p.is_meta
    )
    found: set[int] = set()
    for (_, end, device, one), (start, _, other_device, two) in pairwise(spans):
        if start < end and device == other_device:
            found |= {one, two}
    return found


def _untie(model: nn.Module, untie: Mapping[str, list[str]]) -> None:
    """Give tied weights values of their own, and let the config say it, for the disk.

    The config has one switch for all ties, so parameters that it tied besides (the bias of a head)
    get their own copy too.
    """
    keys = getattr(model, "all_tied_weights_keys", None)
    modules = {clean(path): module for path, module in model.named_modules(remove_duplicate=False)}
    for path in [*untie, *(keys or ())]:
        core, _, name = path.rpartition(".")
        module = modules[core]
        parameter = module._parameters[name]
        if parameter is not None and _uses(model, parameter) > 1:
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module._parameters[name] = own
    config: Any = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if isinstance(keys, dict):
        keys.clear()
    unfrozen = attached_to(model).unfrozen  # it knew the tie by one of its names
    for paths in untie.values():
        if set(paths) & set(unfrozen):
            unfrozen += [path for path in paths if path not in unfrozen]


def _uses(model: nn.Module, parameter: nn.Parameter) -> int:
    """How many modules hold this very Parameter."""
    return sum(p is parameter for m in model.modules() for p in m._parameters.values())


def _forget_digest(model: nn.Module, shares: Mapping[str, float]) -> None:
    """The base is another one now: adapters made on it must not pass for those of the old one."""
    base = base_of(model)
    if base is not None:
        name = " + ".join([base.name, *shares])
        model.__dict__["_lorica_base"] = replace(base, name=name, digest="")

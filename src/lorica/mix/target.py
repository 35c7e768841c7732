"""What adapters make of one parameter: the weight, and what rounding it does.

    W' = round(W + sum_i w_i (W_i - W))

W_i is the weight as adapter i alone would make it; for LoRA W_i - W = s B A. The sum is taken in
float32 (float64 for a float64 base) and rounded once, to the dtype of the base or to its quantized
storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import adapters
from lorica.attach.layers import describe, to_stored
from lorica.attach.plates import Slot
from lorica.attach.survey import clean
from lorica.base import storage
from lorica.errors import MergeError
from lorica.methods.method import Layer
from lorica.mix.report import MergedWeight


@dataclass(frozen=True, eq=False)
class Target:
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


def targets_of(model: nn.Module, shares: Mapping[str, float]) -> Iterator[Target]:
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
            yield Target(full, module, name, acting, layer)


def _scales_bias(slot: Slot) -> bool:
    return hasattr(slot.method, "merged_bias")


def hindrance(target: Target, held: bool = True) -> str | None:
    """Why an update cannot go into this weight; `held`: whether its values are in memory."""
    layer = target.layer
    adds = [slot for _, slot in target.parts if not slot.method.replaces]
    copies = [(share, slot) for share, slot in target.parts if slot.method.replaces]
    if held and target.parameter.is_meta:
        return "a weight without values (device meta) cannot be written"
    if text := storage.hindrance(target.module, target.name):
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


def rounded(target: Target, *, requantize: bool = False) -> Tensor:
    """The new weight in the dtype of the base; not rounded where it will be quantized again."""
    base, update = _parts(target)
    exact = _exact(target, base, update)
    if requantize and storage.is_packed(target.module, target.name):
        return exact
    return exact.to(storage.weight_dtype(target.module, target.name))


def measured(target: Target, *, requantize: bool = False) -> MergedWeight:
    """What rounding the new weight will do to it."""
    return merged(target, requantize=requantize)[1]


def merged(target: Target, *, requantize: bool = False) -> tuple[Tensor, MergedWeight]:
    """The new weight as it will be read, in the dtype of the base, and what rounding did to it."""
    parameter = storage.read_weight(target.module, target.name).detach()
    base, update = _parts(target)
    new = _exact(target, base, update)
    packs = requantize and storage.is_packed(target.module, target.name)
    if packs:
        new = storage.rounded_weight(target.module, new)
    new = new.to(parameter.dtype)
    plain = str(parameter.dtype).removeprefix("torch.")
    error = (new.to(torch.float64) - base.to(torch.float64)).sub_(update)
    size = _rms(update)
    entry = MergedWeight(
        target.path,
        tuple(parameter.shape),
        storage.storage_of(target.module, target.name) if packs else plain,
        size,
        _rms(error) / size if size else 0.0,
        float((new != parameter).double().mean()),
    )
    return new, entry


def _parts(target: Target) -> tuple[Tensor, Tensor]:
    """The weight as it is and what is added to it, in float32 or wider."""
    parameter = storage.read_weight(target.module, target.name).detach()
    base = parameter.to(torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    update = torch.zeros_like(base)
    for share, slot in target.parts:
        update += update_of(target, slot, base) * share
    return base, update


def _exact(target: Target, base: Tensor, update: Tensor) -> Tensor:
    """The sum; a copy that replaces the weight by itself is taken bit for bit."""
    (share, slot), *others = target.parts
    if not others and share == 1.0 and slot.method.replaces:
        return slot.tensors[target.name].detach().to(base)
    return base + update


def update_of(target: Target, slot: Slot, base: Tensor) -> Tensor:
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

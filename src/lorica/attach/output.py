"""The output of a layer that is called, with what the acting adapters make of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lorica.attach.acting import acting
from lorica.attach.dropout import drawn_mask, drop
from lorica.attach.gates import is_gated, open_prefix, opened, with_gates
from lorica.attach.intervene import edited, is_intervention, locate
from lorica.attach.plates import Plates, Slot
from lorica.attach.prompt import is_prompt, run
from lorica.attach.rows import row_gate
from lorica.base.quantized import QuantizedLinear
from lorica.base.storage import weight_dtype
from lorica.errors import ActivationError
from lorica.methods.method import Tensors
from lorica.ops.lora import Segment, lora_linear


def run_whole(
    module: Any, inner: Any, plates: Plates, names: list[str], args: tuple, kwargs: dict
) -> Any:
    """The stack of layers, a block of it or a part of a block, with what acts on it as a whole."""
    gated = any(is_gated(plates.slots[name].method) for name in names)
    if gated and plates.layer.kind == "model":
        run_it = partial(_run_acting, module, inner, plates, names, args, kwargs)
        return with_gates(module, plates, run_it, args, kwargs)
    return _run_acting(module, inner, plates, names, args, kwargs)


def _run_acting(
    module: Any, inner: Any, plates: Plates, names: list[str], args: tuple, kwargs: dict
) -> Any:
    methods = {name: plates.slots[name].method for name in names}
    prompts = [name for name in names if is_prompt(methods[name])]
    edits = [name for name in names if is_intervention(methods[name])]
    if edits and plates.layer.kind == "model":
        plates.status.where = locate(module, plates, edits, args, kwargs)
    if prompts and (now := acting(plates, prompts)) is not None:
        if plates.layer.kind == "model":
            return run(module, inner, now, args, kwargs)
        kwargs = open_prefix(module, plates, now, args, kwargs)
    y = inner(*args, **kwargs)
    if edits and plates.layer.kind == "block":
        return edited(plates, edits, y, partial(row_gate, plates))
    rest = [name for name in names if plates.slots[name].tensors and name not in [*prompts, *edits]]
    return add_adapters(module, plates, rest, y, args, kwargs) if rest else y


def segments_of_dense(
    module: Any, plates: Plates, names: list[str], args: tuple, kwargs: dict
) -> list[Segment] | None:
    """The products of a plain dense layer in training, where one function can make all of it."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    plain = (
        module._lorica_base in (nn.Linear, QuantizedLinear)
        and "_lorica_inner" not in module.__dict__
        and torch.is_grad_enabled()
        and len(args) == 1
        and not kwargs
        and all(type(t) in (Tensor, nn.Parameter, FakeTensor) for t in (weight, args[0]))
    )
    if not plain or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    x, route, slots = args[0], plates.route, [plates.slots[n] for n in names]
    assert route is not None
    if (
        not all(slot.method.stacks for slot in slots)
        or x.is_meta
        or x.dtype != weight_dtype(module)
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    if route.segments is not None:
        return _segments(plates, x, module.training)
    return [_only_segment(plates, slots[0], x, module.training)] if route.weights is None else None


def add_adapters(
    module: Any, plates: Plates, names: list[str], y: Any, args: tuple, kwargs: dict
) -> Tensor:
    """The base output `y` plus what the acting adapters add for the arguments of this call."""
    route, training = plates.route, module.training
    assert route is not None
    if not isinstance(y, Tensor):
        raise ActivationError(
            f"{plates.path} returns a {type(y).__name__}, so copies of it cannot be mixed",
            mend="activate one adapter alone, with weight 1",
        )
    if y.is_meta:  # without values there is nothing to add
        return y
    x = args[0] if args else next(iter(kwargs.values()))
    if route.segments is not None:
        segments = _segments(plates, x, training)
        return lora_linear(x, y, segments) if segments else y
    slots = [plates.slots[n] for n in names]
    stack = plates.layer.kind == "linear" and all(s.method.stacks for s in slots)
    if route.weights is None and stack:
        return lora_linear(x, y, [_only_segment(plates, slots[0], x, training)])
    if stack and not (training and any(s.dropout for s in slots)):
        return _add_stack(plates, slots, x, y)
    result = y
    for name, slot in zip(names, slots, strict=True):
        if slot.method.replaces:
            adapted = run_copy(module, slot, *args, **kwargs)
        else:
            dropped = drop(x, slot.dropout, plates) if training else x
            tensors = cast(Tensors, slot.tensors)
            seen = result if route.stacked else y
            adapted = slot.method.apply(dropped, seen, tensors, plates.layer)
            if is_gated(slot.method):
                share = opened(plates, name, cast(Any, slot.method).gate(x, seen, tensors))
                adapted = seen + share * (adapted - seen)
            if route.stacked:
                result = adapted
                continue
        if route.weights is None:
            result = result + (adapted - y) if len(names) > 1 else adapted
        else:
            weight = row_gate(plates, route.weights[..., [route.names.index(name)]], y)
            result = result + (adapted - y) * weight.to(y.dtype)
    return result


def _only_segment(plates: Plates, slot: Slot, x: Tensor, training: bool) -> Segment:
    """The products of the one adapter that acts, on all rows."""
    method: Any = slot.method
    seed = plates.route.dropout_seed if plates.route is not None else None
    return _dropping(method.segment(slot.tensors), slot, plates, x, training, seed)


def _dropping(
    segment: Segment, slot: Slot, plates: Plates, x: Tensor, training: bool, seed: int | None
) -> Segment:
    """A segment with what dropout keeps of its rows: of these alone, whatever lies beside them."""
    if not (training and slot.dropout):
        return segment
    start, end, _ = slice(segment.start, segment.end).indices(x.shape[:-1].numel())
    shape = torch.Size((end - start, x.shape[-1]))
    kept = drawn_mask(shape, slot.dropout, plates, seed, x.device)
    return replace(segment, kept=kept, dropped=slot.dropout)


def _segments(plates: Plates, x: Tensor, training: bool) -> list[Segment]:
    """Training: every adapter has rows of its own; its products see those rows alone."""
    route = plates.route
    assert route is not None and route.segments is not None
    rows, width = x.shape[:-1].numel(), route.segments[-1][1]
    covers = route.segments
    if rows != width and route.kept is not None and rows == route.kept[-1][1]:
        covers = route.kept
    elif rows != width:
        raise ActivationError(
            f"{plates.path}: the segments cover {width} rows, but the layer was given {rows}",
            mend="adapt this layer with one adapter at a time",
        )
    segments: list[Segment] = []
    seeds = route.seeds or (None,) * len(covers)
    for (start, end, name), seed in zip(covers, seeds, strict=True):
        if slot := plates.slots.get(name):
            method: Any = slot.method
            own = method.segment(slot.tensors, start, end)
            segments.append(_dropping(own, slot, plates, x, training, seed))
    return segments


def _add_stack(plates: Plates, slots: list[Slot], x: Tensor, y: Tensor) -> Tensor:
    """A mixture of low-rank adapters as one product: stacked factors, a gate of scale x weight."""
    route = plates.route
    assert route is not None and route.weights is not None
    stacked: list[Any] = [slot.method for slot in slots]
    parts = [m.segment(slot.tensors) for m, slot in zip(stacked, slots, strict=True)]
    columns = [i for i, n in enumerate(route.names) if n in plates.slots]
    weights = route.weights.double() if y.dtype == torch.float64 else route.weights
    A = torch.cat([part.A_RI for part in parts])
    B = torch.cat([part.B_OR for part in parts], dim=1)
    gates = [
        weights[..., i : i + 1].expand(*weights.shape[:-1], part.A_RI.shape[0]) * part.scale
        for i, part in zip(columns, parts, strict=True)
    ]
    gate = torch.cat(gates, dim=-1)
    if gate.dim() == 2:
        width = gate.shape[1]
        gate = row_gate(plates, gate, x).expand(*x.shape[:-1], width).reshape(-1, width)
    return lora_linear(x, y, [Segment(0, None, A, B, gate=gate)])


def covers_all(plates: Plates) -> bool:
    """Whether one adapter acts on all rows, with weight 1."""
    route = plates.route
    return (
        route is not None
        and route.weights is None
        and route.segments is None
        and len(route.names) == 1
    )


def run_copy(module: Any, slot: Slot, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward over the copied parameters.

    The stand-in shares everything with the layer but its class, which is the original, and its
    parameters.
    """
    base = type(module)._lorica_base
    stand_in = object.__new__(base)  # a class of FSDP would run its __init__
    parameters = {
        name: slot.tensors[name].to(weight_dtype(module, name)) if name in slot.tensors else p
        for name, p in module._parameters.items()
    }
    stand_in.__dict__.update(module.__dict__, _parameters=parameters)
    return base.forward(stand_in, *args, **kwargs)

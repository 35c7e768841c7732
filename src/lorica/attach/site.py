"""A site: a layer of the base whose class was swapped for one that adds the adapters put there.

The layer stays the same object under the same path: `state_dict`, `parameters()` and `isinstance`
answer as before, and leaving is one assignment back. The adapters' tensors lie in `Plates`, one per
site, in the module's `__dict__` and not in the module tree. Which adapters act is the `Route` that
`activate` writes at every site; it is plain data on the plates, because context variables break
compiled graphs and autograd's own threads do not carry them.

Two kinds of site. A *forward site* is a layer that its parent calls: it adds to the output. A
*weight site* is a layer, or a bare parameter, whose weight other code reads (attention modules of
torch, expert weights in one 3-D parameter): reading the parameter gives W + s B A. Why this
mechanism and none of four others was measured before anything was built; the figures are in
docs/design.md.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from lorica.attach.acting import acting
from lorica.attach.intervene import edited, is_intervention, locate
from lorica.attach.layers import describe, to_stored
from lorica.attach.prompt import is_prompt, run
from lorica.errors import ActivationError, LoricaError, LoricaWarning
from lorica.methods.method import Layer, Method, Tensors
from lorica.ops.lora import Segment, adapted_linear, lora_linear

_ROUTED = re.compile(r"(^|\.)experts\.\d+\.")  # is given some of the tokens, of any row


@dataclass(eq=False)
class Slot:
    """What one adapter holds at one site."""

    method: Method
    tensors: dict[str, nn.Parameter]
    rests: bool = False
    """Whether another adapter trains on top of it: it acts as it does in use."""

    @property
    def dropout(self) -> float:
        """The share of its inputs that it drops in training."""
        return 0.0 if self.rests else self.method.dropout


@dataclass(frozen=True, eq=False)
class Route:
    """Which adapters act on which rows. One object is shared by all sites of an activation.

    Attributes:
        names: the adapters that take part, in the order of the columns of `weights`.
        weights: None where the one adapter of `names` acts on all rows with weight 1; (N,) for a
            mixture on all rows; (rows, N) for one mixture per row of the batch.
        segments: instead of weights, for training: (start, end, name) over the rows of the
            flattened batch.
        dropout_seed: makes the adapters' dropout repeatable; None draws from torch's global state.
        seeds: the same for each segment, where there are segments.
        stacked: at every place the adapters follow each other in the order of `names`, each given
            what the one before made of the output; else all are given the base's, and are added.
    """

    names: tuple[str, ...]
    weights: Tensor | None = None
    segments: tuple[tuple[int, int, str], ...] | None = None
    dropout_seed: int | None = None
    seeds: tuple[int, ...] = ()
    stacked: bool = False

    @cached_property
    def table(self) -> list[list[float]]:
        """The weights as numbers: one list for all rows, or one for each."""
        assert self.weights is not None
        found = self.weights.tolist()
        return found if self.weights.dim() == 2 else [found]


@dataclass(eq=False)
class Status:
    """What all sites of one model share.

    Attributes:
        decided: whether anybody has said what is to act. Until then a forward pass warns: an
            adapter that sits on a model without effect is the mistake that nobody sees.
        owner: the thread that activated; another one would change its answers.
        tokens: rows times positions that the newest layer with a batch was given.
        prompts: how long the prompts of the batch are, if a task told it; see `base.batch`.
        where: by adapter, the tokens whose hidden states it edits in this forward pass.
    """

    decided: bool = False
    owner: int | None = None
    tokens: int = 0
    prompts: Sequence[int] | None = None
    where: dict[str, Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:  # a copy is inactive, and nobody's
        plain = {"decided": False, "owner": None, "tokens": 0}
        return {**plain, "prompts": None, "where": {}}

    def warn_undecided(self) -> None:
        """Warn, once, that nothing acts because nobody said that anything should."""
        if self.decided or torch.compiler.is_compiling():
            return
        self.decided = True
        warnings.warn(
            "adapters are attached to this model but none was activated, so it answers as its base "
            "does; call lorica.activate(model, NAME), or lorica.activate(model, None) if that is "
            "meant",
            LoricaWarning,
            stacklevel=4,
        )


@dataclass(eq=False)
class Plates:
    """The adapters of one site, and the route that is in force."""

    path: str
    layer: Layer
    status: Status
    slots: dict[str, Slot] = field(default_factory=dict)
    route: Route | None = None
    last: Route | None = None
    """The route of the newest forward pass: what tells sites that were passed by."""
    recorded: tuple[Route | None] | None = None
    """The route of the newest forward pass that autograd recorded; None before there was one."""

    def __getstate__(self) -> dict[str, Any]:  # a copy starts inactive
        return {**self.__dict__, "route": None, "last": None, "recorded": None}

    def acting(self) -> list[str]:
        """Names of the adapters that sit here and take part in the route."""
        return [n for n in self.route.names if n in self.slots] if self.route is not None else []

    def note_visit(self) -> None:
        """Remember the route of this pass; refuse a recomputation that runs under another one.

        A pass without gradients in between, such as that of a reference model, does not count.
        Reentrant checkpointing runs its own forward pass so, and nothing is recorded then: the
        newest pass counts.
        """
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            self.last = self.route
            if torch.is_grad_enabled():
                self.recorded = (self.route,)
        elif (self.recorded[0] if self.recorded else self.last) is not self.route:
            raise ActivationError(
                f"{self.path} was recomputed in the backward pass under another activation than "
                "its forward pass",
                mend="run backward inside the same activate(...) as the forward pass",
            )

    def to(self, device: torch.device) -> None:
        """Follow the base to a device; not to meta, where the tensors' values would be lost."""
        if device.type == "meta":
            return
        for slot in self.slots.values():
            for tensor in slot.tensors.values():
                if tensor.device != device:  # an optimizer keeps its objects
                    tensor.data = tensor.data.to(device)


class Site:
    """Mixed in before the class of the original layer; see `site_class`."""

    _lorica_base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plates: Plates = self.__dict__["_lorica"]
        plates.status.warn_undecided()
        plates.note_visit()
        names = plates.acting()
        if names and _covers_all(plates) and plates.slots[names[0]].method.replaces:
            return _run_copy(self, plates.slots[names[0]], *args, **kwargs)
        # accelerate and others put a forward on the instance
        inner = self.__dict__.get("_lorica_inner") or super().forward  # pyright: ignore
        if names and plates.layer.kind in ("model", "block"):
            return _run_whole(self, inner, plates, names, args, kwargs)
        if names and (segments := _segments_of_dense(self, plates, names, args, kwargs)):
            return adapted_linear(args[0], self.weight, self.bias, segments)  # pyright: ignore
        y = inner(*args, **kwargs)
        return _add_adapters(self, plates, names, y, args, kwargs) if names else y

    @property
    def lorica_virtual_tokens(self) -> int:
        """The most virtual tokens that an adapter puts in front of the input of this module."""
        slots = self.__dict__["_lorica"].slots.values() if "_lorica" in self.__dict__ else ()
        return max((getattr(slot.method, "num_virtual_tokens", 0) for slot in slots), default=0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The plates follow the device, never the dtype."""
        super()._apply(fn, recurse)  # pyright: ignore
        for plates in plates_of(cast(nn.Module, self)):
            for slot in plates.slots.values():
                for tensor in slot.tensors.values():
                    plates.to(fn(tensor.detach().new_empty(0)).device)
                    break
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:  # a class made here has no name to import
        own = type(self)
        return _rebuild, (own._lorica_base, _read_parameters(own)), self.__dict__.copy()


def _run_whole(
    module: Any, inner: Any, plates: Plates, names: list[str], args: tuple, kwargs: dict
) -> Any:
    """The stack of layers, a block of it or a part of a block, with what acts on it as a whole."""
    prompts = [name for name in names if is_prompt(plates.slots[name].method)]
    edits = [name for name in names if is_intervention(plates.slots[name].method)]
    if edits and plates.layer.kind == "model":
        plates.status.where = locate(module, plates, edits, args, kwargs)
    if prompts and (now := acting(plates, prompts)) is not None:
        return run(module, inner, now, args, kwargs)
    y = inner(*args, **kwargs)
    if edits and plates.layer.kind == "block":
        return edited(plates, edits, y, partial(_row_gate, plates))
    rest = [name for name in names if name not in prompts and name not in edits]
    return _add_adapters(module, plates, rest, y, args, kwargs) if rest else y


def _segments_of_dense(
    module: Any, plates: Plates, names: list[str], args: tuple, kwargs: dict
) -> list[Segment] | None:
    """The products of a plain dense layer in training, where one function can make all of it."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    plain = (
        module._lorica_base is nn.Linear
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
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    if route.segments is not None:
        return _segments(plates, x, module.training)
    return [_only_segment(plates, slots[0], x, module.training)] if route.weights is None else None


def _add_adapters(
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
            adapted = _run_copy(module, slot, *args, **kwargs)
        else:
            dropped = _dropout(x, slot.dropout, plates) if training else x
            tensors = cast(Tensors, slot.tensors)
            if route.stacked:
                result = slot.method.apply(dropped, result, tensors, plates.layer)
                continue
            adapted = slot.method.apply(dropped, y, tensors, plates.layer)
        if route.weights is None:
            result = result + (adapted - y) if len(names) > 1 else adapted
        else:
            weight = _row_gate(plates, route.weights[..., [route.names.index(name)]], y)
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
    kept = _kept(shape, slot.dropout, plates, seed, x.device)
    return replace(segment, kept=kept, dropped=slot.dropout)


def _segments(plates: Plates, x: Tensor, training: bool) -> list[Segment]:
    """Training: every adapter has rows of its own; its products see those rows alone."""
    route = plates.route
    assert route is not None and route.segments is not None
    rows, width = x.shape[:-1].numel(), route.segments[-1][1]
    if rows != width:
        raise ActivationError(
            f"{plates.path}: the segments cover {width} rows, but the layer was given {rows}",
            mend="adapt this layer with one adapter at a time",
        )
    segments: list[Segment] = []
    seeds = route.seeds or (None,) * len(route.segments)
    for (start, end, name), seed in zip(route.segments, seeds, strict=True):
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
        gate = _row_gate(plates, gate, x).expand(*x.shape[:-1], width).reshape(-1, width)
    return lora_linear(x, y, [Segment(0, None, A, B, gate=gate)])


def _row_gate(plates: Plates, gate: Tensor, like: Tensor) -> Tensor:
    """(N,) or (rows, N) shaped so that it broadcasts against `like`, (batch, ..., features).

    Beams and returned sequences repeat every row in place, so a batch of a multiple of the rows is
    served. Some models lay all tokens of the batch in one dimension in the midst of a block (OPT,
    shared experts): these are known by their number, which is that of the layer before.
    """
    if gate.dim() == 1:
        return gate
    times, rest = divmod(like.shape[0], gate.shape[0])
    flat = like.dim() == 2
    if not torch.compiler.is_compiling():
        if not flat and plates.layer.kind == "linear":
            plates.status.tokens = like.shape[:-1].numel()
        flat = flat and like.shape[0] != plates.status.tokens
    batched = like.dim() >= 2 + len(plates.layer.kernel_size) and not _ROUTED.search(plates.path)
    if not batched or not times or rest or (times != 1 and flat):
        raise ActivationError(
            f"{plates.path}: {gate.shape[0]} rows are active, but this layer was given "
            f"{tuple(like.shape)}",
            expected="a batch with one entry of the activation per row",
        )
    gate = gate if times == 1 else gate.repeat_interleave(times, 0)
    ones = [1] * (like.dim() - 2)
    if plates.layer.kind in ("conv1d", "conv2d"):  # channels first
        return gate.view(-1, gate.shape[1], *ones)
    return gate.view(-1, *ones, gate.shape[1])


def _dropout(x: Tensor, share: float, plates: Plates) -> Tensor:
    """Dropout whose mask depends on the seed of the step and the place only.

    So a resumed run and a recomputed layer draw the same mask. Token ids are left as they are.
    """
    if not share or not x.is_floating_point():
        return x
    seed = plates.route.dropout_seed if plates.route is not None else None
    if seed is None:
        return F.dropout(x, share)
    return x * _kept(x.shape, share, plates, seed, x.device).to(x.dtype) / (1 - share)


def _kept(
    shape: torch.Size, share: float, plates: Plates, seed: int | None, device: torch.device
) -> Tensor:
    """What dropout keeps: drawn from the seed of the step and the place, or from torch's state."""
    if seed is None:
        return torch.rand(shape, device=device) >= share
    digest = hashlib.sha256(f"{seed}/{plates.path}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator, device=device) >= share


def _covers_all(plates: Plates) -> bool:
    """Whether one adapter acts on all rows, with weight 1."""
    route = plates.route
    return (
        route is not None
        and route.weights is None
        and route.segments is None
        and len(route.names) == 1
    )


def _run_copy(module: Any, slot: Slot, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward over the copied parameters.

    The stand-in shares everything with the layer but its class, which is the original, and its
    parameters.
    """
    base = type(module)._lorica_base
    stand_in = base.__new__(base)
    parameters = {
        name: slot.tensors[name].to(p.dtype) if name in slot.tensors else p
        for name, p in module._parameters.items()
    }
    stand_in.__dict__.update(module.__dict__, _parameters=parameters)
    return base.forward(stand_in, *args, **kwargs)


# --- weight sites ---------------------------------------------------------------------------------


def adapted_weight(module: Any, parameter: str) -> Tensor:
    """What code that reads the parameter of a weight site is given."""
    plates: Plates = module.__dict__["_lorica_weights"][parameter]
    weight: Tensor = module._parameters[parameter]
    plates.note_visit()
    names = plates.acting()
    if not names:
        return weight
    route = plates.route
    assert route is not None
    if route.segments is not None or (route.weights is not None and route.weights.dim() > 1):
        raise ActivationError(
            f"{plates.path}: its weight is read as a whole, so all rows share one mixture here",
            mend="activate one mixture for all rows, or leave this layer out of target_modules",
        )
    if route.stacked and names[1:] and not all(plates.slots[n].method.stacks for n in names):
        raise ActivationError(
            f"{plates.path}: other code reads its weight, so adapters cannot follow each other",
            mend="leave this layer out of target_modules",
        )
    result = weight
    for name in names:
        slot = plates.slots[name]
        method: Any = slot.method  # one that has a delta, as was checked when it was attached
        delta = to_stored(module, parameter, method.delta(slot.tensors, plates.layer))
        delta = delta.to(weight.dtype)
        if route.weights is not None:
            delta = delta * route.weights[route.names.index(name)].to(weight.dtype)
        result = result + delta
    return result


class WeightSite(Site):
    """A site whose parameters are read, not called: through a property of the class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plates = plates_of(cast(nn.Module, self))[0]
        plates.status.warn_undecided()  # reading a weight alone is no forward pass
        inner = self.__dict__.get("_lorica_inner")
        return inner(*args, **kwargs) if inner else super(Site, self).forward(*args, **kwargs)  # pyright: ignore


# --- entering and leaving -------------------------------------------------------------------------

_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


def site_class(base: type[nn.Module], parameters: tuple[str, ...] = ()) -> type:
    """The cached subclass of `base` that is a forward site, or a weight site over `parameters`.

    Name, qualified name and module are those of `base`: other libraries match on them.
    """
    key = base, parameters
    if key not in _CLASSES:
        reads = {
            name: property(lambda self, name=name: adapted_weight(self, name))
            for name in parameters
        }
        _CLASSES[key] = type(
            base.__name__,
            (WeightSite if parameters else Site, base),
            {
                "_lorica_base": base,
                "_lorica_reads": parameters,
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                **reads,
            },
        )
    return _CLASSES[key]


def _read_parameters(own: type) -> tuple[str, ...]:
    return own._lorica_reads


def _rebuild(base: Any, parameters: tuple[str, ...]) -> nn.Module:
    module = base.__new__(base)
    module.__class__ = site_class(base, parameters)
    return module


def is_site(module: nn.Module) -> bool:
    """Whether adapters sit on this module."""
    return isinstance(module, Site)


def plates_of(module: nn.Module) -> list[Plates]:
    """The plates of one module: one for a forward site, one per parameter for a weight site."""
    own = module.__dict__
    return [own["_lorica"]] if "_lorica" in own else list(own.get("_lorica_weights", {}).values())


def enter(module: nn.Module, path: str, status: Status, parameter: str | None = None) -> Plates:
    """Make `module` a site, if it is none yet, and return its plates.

    Args:
        path: the name of the place; for a weight site that of the parameter.
        status: shared by all sites of the model.
        parameter: the parameter that other code reads; None for a layer that is called.

    Raises:
        LoricaError: the module is a site of the other kind already.
    """
    if is_site(module):
        if (parameter is None) != ("_lorica" in module.__dict__):
            raise LoricaError(
                f"{path}: adapters sit here in another way already", mend="detach them first"
            )
        if parameter is None:
            return module.__dict__["_lorica"]
    base = getattr(type(module), "_lorica_base", type(module))
    if base.__reduce_ex__ is not object.__reduce_ex__:
        raise LoricaError(
            f"{path}: {base.__name__} has a way of its own to be copied, which a site would break"
        )
    if parameter is None:
        plates = Plates(path, describe(module), status)
        if "forward" in module.__dict__:
            module.__dict__["_lorica_inner"] = module.__dict__.pop("forward")
        module.__dict__["_lorica"] = plates
        module.__class__ = site_class(base)
        return plates
    weights = module.__dict__.setdefault("_lorica_weights", {})
    if parameter not in weights:
        weights[parameter] = Plates(path, describe(module, parameter), status)
        module.__class__ = site_class(base, tuple(sorted(weights)))
    return weights[parameter]


def check_unchanged(module: nn.Module) -> None:
    """Raises LoricaError where somebody changed the class or the forward of a site after us."""
    own: Any = type(module)
    base = getattr(own, "_lorica_base", None)
    if base is None or _CLASSES.get((base, own._lorica_reads)) is not own:
        raise LoricaError(
            f"{own.__name__}: its class was changed again after attaching", mend="undo that first"
        )
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) not in (
        Site.forward,
        WeightSite.forward,
    ):
        raise LoricaError(
            f"{own.__name__}: its forward was replaced after attaching", mend="undo that first"
        )


def leave(module: nn.Module) -> None:
    """Give the module its class back. Raises LoricaError as `check_unchanged` does."""
    check_unchanged(module)
    module.__dict__.pop("forward", None)  # one that a tool put back, bound to our class
    module.__class__ = getattr(type(module), "_lorica_base")  # noqa: B009
    for key in ("_lorica", "_lorica_weights"):
        module.__dict__.pop(key, None)
    if inner := module.__dict__.pop("_lorica_inner", None):
        module.__dict__["forward"] = inner

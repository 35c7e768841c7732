"""Parts of a base that train with less memory and time, recognised by what they compute.

Models of transformers spell the same few parts alike in some two hundred files: RMSNorm, the gated
feed-forward layer, the rotary embedding. A list of classes would be wrong with its next release. So
a part is recognised by its form, and then tried: a small copy of it, with random numbers, must give
the same as the function of `lorica.ops` that is to stand in for it. While the block of `running`
lasts, the function does its work; the modules, their parameters and the code of the model stay as
they are, and everything else in the model runs as it always did.

Activations by themselves are found here too: where adapters share a pass, they are given the rows
of one after those of the other, because their last bits depend on the rows beside (`ops.glu`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.dropout import _DropoutNd

from lorica.base.batch import blocks
from lorica.ops.glu import ACTIVATIONS, gated
from lorica.ops.norm import rms_norm
from lorica.ops.rope import rotate_both

Forward = Callable[[Tensor], Tensor]
Make = Callable[[nn.Module, nn.Module], Forward | None]
"""From a part and the model that it is in."""

_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "act_fn")
_WIDTH, _INNER = 8, 24
"""Features of the copies that are tried."""


@dataclass(frozen=True)
class Lean:
    """What stands in for parts of one model.

    Attributes:
        forwards: modules, and what takes the place of their forward.
        functions: the namespaces of modelling code, names in them, and what takes their place.
        activations: those by themselves, as `forwards`.
        notes: parts of a known form that compute something else, so that they run as they are.
    """

    forwards: list[tuple[nn.Module, Forward]] = field(default_factory=list)
    functions: list[tuple[dict[str, Any], str, Callable]] = field(default_factory=list)
    activations: list[tuple[nn.Module, Forward]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the functions do the work of the parts, forward and backward, inside the block."""
        before = [(space, name, space[name]) for space, name, _ in self.functions]
        try:
            for module, forward in [*self.forwards, *self.activations]:
                module.__dict__["forward"] = forward
            for space, name, function in self.functions:
                space[name] = function
            yield
        finally:
            for module, _ in [*self.forwards, *self.activations]:
                module.__dict__.pop("forward", None)
            for space, name, function in before:
                space[name] = function


def lean_parts(model: nn.Module) -> Lean:
    """The parts of `model` that a function can stand in for.

    Left alone are modules that adapters sit on, that hold parameters which train, or whose forward
    some other tool has replaced.
    """
    found, odd = Lean(), set()
    model = getattr(model, "_orig_mod", model)
    for module in model.modules():
        make = _standing_in_for(module)
        if make is None or "forward" in module.__dict__ or hasattr(type(module), "_lorica_base"):
            continue
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if (forward := make(module, model)) is not None:
            (found.activations if make is _apart else found.forwards).append((module, forward))
        elif make is not _apart:
            odd.add(type(module).__name__)
    found.notes.extend(
        f"{name} computes otherwise than others of its form, so it trains as it is"
        for name in sorted(odd)
    )
    for name in sorted({type(m).__module__ for m in model.modules()}):
        space = vars(sys.modules.get(name, torch))
        own = space.get("apply_rotary_pos_emb")
        if own is not None and _turns_alike(own):
            found.functions.append((space, "apply_rotary_pos_emb", partial(_run_turn, own)))
    return found


def _standing_in_for(module: nn.Module) -> Make | None:
    """What would make the forward that replaces this module's; None for one of no known form."""
    if not _takes_one(type(module)):
        return None
    if all(hasattr(module, name) for name in _FEED_FORWARD):
        return _feed_forward
    if "RMSNorm" in type(module).__name__ or type(module).__name__.endswith("T5LayerNorm"):
        weight = getattr(module, "weight", None)
        return _norm if isinstance(weight, Tensor) and weight.dim() == 1 else None
    plain = not any((module._parameters, module._buffers, module._modules))
    exact = isinstance(module, (nn.Identity, nn.ReLU, _DropoutNd))
    return _apart if plain and not exact and not getattr(module, "inplace", False) else None


def _takes_one(kind: type[nn.Module]) -> bool:
    """Whether the forward takes one tensor and nothing else."""
    return len(inspect.signature(kind.forward).parameters) == 2


# --- RMSNorm --------------------------------------------------------------------------------------


def _norm(module: nn.Module, model: nn.Module) -> Forward | None:
    """Weights are around 1, or, in some models, around 0 with 1 added to them."""
    eps = next((vars(module)[n] for n in ("variance_epsilon", "eps") if n in vars(module)), None)
    if not isinstance(eps, float):
        return None
    for offset in (0.0, 1.0):
        if _known(module, "norm", offset, lambda copy, at=offset: _normed(copy, eps, at)):
            return partial(_run_norm, module, eps, offset)
    return None


def _normed(copy: nn.Module, eps: float, offset: float) -> bool:
    same = []
    for dtype in _PRECISIONS:
        weight = (torch.rand(_WIDTH) + 0.5).to(dtype)
        copy._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        x = torch.randn(64, _WIDTH).mul(3).to(dtype)
        exact = rms_norm(x.double(), weight.double(), eps, offset)
        same.append(_as_good(rms_norm(x, weight, eps, offset), copy(x), exact))
    return all(same)


def _run_norm(module: Any, eps: float, offset: float, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype or x.dtype == torch.float64:
        return type(module).forward(module, x)  # rounded in an order of the model's own
    return rms_norm(x, module.weight, eps, offset)


# --- gated feed-forward layers --------------------------------------------------------------------


def _feed_forward(module: nn.Module, model: nn.Module) -> Forward | None:
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.children()):
        return None
    for activation in ACTIVATIONS:
        if _known(module, "feed-forward", activation, lambda copy, a=activation: _fed(copy, a)):
            return partial(_run_feed_forward, module, model, activation)
    return None


def _fed(copy: Any, activation: str) -> bool:
    for name, inner, outer in (
        ("gate_proj", _WIDTH, _INNER),
        ("up_proj", _WIDTH, _INNER),
        ("down_proj", _INNER, _WIDTH),
    ):
        copy._modules[name] = nn.Linear(inner, outer)
    x = torch.randn(5, _WIDTH).mul(3)
    return torch.allclose(copy(x), _run_feed_forward(copy, copy, activation, x), 0, 1e-6)


def _run_feed_forward(module: Any, model: nn.Module, activation: str, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(gated(gate, up, activation, sizes=blocks(model, gate)))


# --- activations ----------------------------------------------------------------------------------


def _apart(module: nn.Module, model: nn.Module) -> Forward | None:
    """Only what treats every number by itself; whoever reads other rows must see them."""
    if _known(module, "activation", None, _single):
        return partial(_run_apart, module, model)
    return None


def _single(copy: nn.Module) -> bool:
    """Whether no number depends on another, on its place, or on chance."""
    x = torch.randn(1, _WIDTH, _INNER)
    larger = x.clone()
    larger[0, 0, 0] = 9.0
    copy.train()
    made, turned = copy(x), copy(x[0].t().contiguous())
    if made.shape != x.shape or not torch.allclose(turned.t(), made[0], 0, 1e-6):
        return False
    return torch.allclose(copy(larger).flatten()[1:], made.flatten()[1:], 0, 1e-6)


def _run_apart(module: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    own, sizes = type(module).forward, blocks(model, x)
    if not sizes:
        return own(module, x)
    parts = x.flatten(0, -2).split(list(sizes))
    return torch.cat([own(module, part) for part in parts]).view(x.shape)


# --- rotary embedding -----------------------------------------------------------------------------


def _run_turn(
    own: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if cos.dtype != q.dtype:
        return own(q, k, cos, sin, unsqueeze_dim)  # rounded in an order of the model's own
    return rotate_both(q, k, cos, sin, unsqueeze_dim)


def _turns_alike(own: Callable) -> bool:
    """Whether a model's own function turns queries and keys as `rotate_both` does."""
    if own not in _TURNS:
        if list(inspect.signature(own).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
            return False
        with unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            whole = [_turned_alike(own, dtype, 8) for dtype in _PRECISIONS]
            part = _turned_alike(own, torch.float32, 4)
            _TURNS[own] = all(whole) and part is not False
    return _TURNS[own]


def _turned_alike(own: Callable, dtype: torch.dtype, angles: int) -> bool | None:
    """On heads of 8 features; None where it does not take so many angles."""
    q, k = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(2, 1, 5, 8).to(dtype)
    cos, sin = torch.randn(2, 5, angles).to(dtype), torch.randn(2, 5, angles).to(dtype)
    try:
        theirs = own(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    exact = rotate_both(q.double(), k.double(), cos.double(), sin.double())
    ours = rotate_both(q, k, cos, sin)
    return all(_as_good(a, b, c) for a, b, c in zip(ours, theirs, exact, strict=True))


# --- trying ---------------------------------------------------------------------------------------

_PRECISIONS = (torch.float32, torch.bfloat16)
"""Those that training runs in."""

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""Of parts that want something else than they are tried with."""

_TRIED: dict[tuple, bool] = {}
_TURNS: dict[Callable, bool] = {}


def _as_good(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether `ours` is the same number as `theirs` up to rounding, and not more rounded."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    own, other = (ours.double() - exact).norm(), (theirs.double() - exact).norm()
    unit = torch.finfo(ours.dtype).eps * exact.norm()
    return bool(other <= 2 * unit and own <= 1.5 * other + 0.1 * unit)


def _known(module: nn.Module, form: str, variant: Any, same: Callable[[Any], bool]) -> bool:
    """Whether a copy of `module` with small random parameters computes `form`; tried once for all
    modules of a class with the same settings.
    """
    plain = (str, int, float, bool, type(None))
    settings = sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain))
    children = [(name, type(child), repr(child)) for name, child in module.named_children()]
    others = [c for c in children if not c[0].endswith("_proj")]
    key = type(module), form, variant, str(settings), str(others)
    if key not in _TRIED:
        copy = type(module).__new__(type(module))
        copy.__dict__.update(vars(module), _modules=dict(module._modules), _parameters={})
        copy.__dict__.update(_forward_hooks={}, _forward_pre_hooks={})
        with unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            try:
                _TRIED[key] = same(copy)
            except _FAILURES:
                _TRIED[key] = False
    return _TRIED[key]

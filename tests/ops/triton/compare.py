"""How a twin is judged: against plain torch, in value and gradient, at every precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times `scale`, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def run(function: Callable, inputs: Sequence[Tensor], wanted: Sequence[int], *rest: Any) -> list:
    """Outputs of `function(*inputs, *rest)` and the gradients of the inputs that `wanted` names.

    Every output is weighed with fixed random numbers before it is differentiated.
    """
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    outputs = function(*leaves, *rest)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weights = [random(*o.shape, seed=70 + i).to(o) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, weights)
    return [*(o.detach() for o in outputs), *(leaves[i].grad for i in wanted)]


def close_in_float32(twin: Callable, plain: Callable, inputs: list[Tensor], wanted, *rest: Any):
    """Outputs and gradients within 1e-5 of plain autograd's, of the largest number of each."""
    inputs = [t.float() if t.is_floating_point() else t for t in inputs]
    for ours, theirs in zip(
        run(twin, inputs, wanted, *rest), run(plain, inputs, wanted, *rest), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.isfinite(ours).all()
        apart = (ours - theirs).abs().max().item() if ours.numel() else 0.0
        assert apart <= 1e-5 * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)


def as_right_as_plain(
    twin: Callable, plain: Callable, inputs: list[Tensor], wanted, dtype: torch.dtype, *rest: Any
):
    """Rounded inputs: the error against float64 is at most 1.5 times that of plain torch."""
    given = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    exact = run(plain, [t.double() if t.is_floating_point() else t for t in given], wanted, *rest)
    ours, theirs = run(twin, given, wanted, *rest), run(plain, given, wanted, *rest)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        error, allowed = (mine.double() - right).norm(), (other.double() - right).norm()
        assert error <= 1.5 * allowed + 1e-6 * right.norm(), (error, allowed)

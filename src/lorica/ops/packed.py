"""A weight that lies packed, and the layer that multiplies with it.

The weight is unpacked into a buffer that all layers share, multiplied with, and forgotten: neither
the forward nor the backward pass keeps anything as large as the weight. Every thread has a buffer
of its own for each device and dtype; on a GPU every stream as well, since work on one stream does
not wait for another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorica.ops.four_bit import Form
from lorica.ops.triton.choose import twin


@dataclass(frozen=True, eq=False)
class Packed:
    """A frozen weight in a storage that is not its numbers.

    Attributes:
        shape: of the weight, (out, in).
        dtype: of the weight that it stands for.
        tensors: what is stored, by name.
        unpack: writes the numbers into a tensor of that shape, in any floating dtype.
        form: how its bytes lie, where a kernel can read them by itself.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor] = field(repr=False)
    unpack: Callable[[Mapping[str, Tensor], Tensor], object] = field(repr=False)
    form: Form | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def numbers(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, in memory of its own."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        self.unpack(self.tensors, out)
        return out

    def passing(self, dtype: torch.dtype) -> Tensor:
        """The weight in the shared buffer: to be used at once, before the next one is asked for."""
        stored = next(iter(self.tensors.values()))
        if torch.compiler.is_compiling() or isinstance(stored, FakeTensor) or stored.is_meta:
            return self.numbers(dtype)
        out = _buffer(self.shape, dtype, self.device)
        with torch.no_grad():
            self.unpack(self.tensors, out)
        return out


_OWN = threading.local()


def _buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    buffers = _OWN.__dict__.setdefault("buffers", {})
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    number = torch.Size(shape).numel()
    key = device, dtype, stream
    if key not in buffers or buffers[key].numel() < number:
        buffers.pop(key, None)  # before the larger one is there
        with torch.inference_mode(False):
            buffers[key] = torch.empty(number, dtype=dtype, device=device)
    return buffers[key][:number].view(shape)


def dense(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """A frozen dense layer, whatever the storage of its weight.

    Semantics: F.linear(x, numbers of weight, bias)

    Args:
        x: (..., I), in whose dtype a packed weight is unpacked. weight: (O, I). bias: (O,).
    """
    if not isinstance(weight, Packed):
        return F.linear(x, weight, bias)
    if (made := _inside(x, weight, bias, transposed=False)) is not None:
        return made
    return F.linear(x, weight.passing(x.dtype), bias)


def input_gradient(g: Tensor, weight: Tensor | Packed) -> Tensor:
    """The gradient of the input of such a layer.

    Semantics: g @ numbers of weight

    Args:
        g: (..., O), the gradient of its output. weight: (O, I).
    """
    if not isinstance(weight, Packed):
        return g @ weight
    if (made := _inside(g, weight, None, transposed=True)) is not None:
        return made
    return g @ weight.passing(g.dtype)


def _inside(x: Tensor, weight: Packed, bias: Tensor | None, *, transposed: bool) -> Tensor | None:
    """The product by a kernel that unpacks the weight inside; None where there is none or it does
    not pay.
    """
    if weight.form is None or isinstance(x, FakeTensor) or x.is_meta:
        return None
    given = (x,) if bias is None else (x, bias)
    fused = twin("packed_product", *given)
    return None if fused is None else fused(x, weight, bias, transposed=transposed)


def frozen_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """A dense layer over a packed weight, which gets no gradient.

    Semantics: F.linear(x, numbers of weight, bias)

    Args:
        x: (..., I), in whose dtype is computed; under autocast in that of autocast.
        bias: (O,), which may train.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    bias = bias if bias is None else bias.to(x.dtype)
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if recorded and not torch.compiler.is_compiling():
        return _FrozenLinear.apply(x, bias, weight)  # type: ignore[return-value]
    return dense(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """Saves nothing: the weight is unpacked again for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        ctx.weight = weight
        return dense(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        dx = input_gradient(g, ctx.weight) if ctx.needs_input_grad[0] else None
        db = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None

"""A linear layer over a packed weight: `nn.Linear` to everyone who asks.

It is the layer itself with its class swapped, as a site is: the same object under the same path,
with the same bias. The packed weight is its parameter `weight`, what belongs to it lies in buffers,
and its state dict has the names and bytes of bitsandbytes' layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.base.quantizer import Quantizer, Stored
from lorica.errors import BaseModelError
from lorica.ops.packed import Packed, frozen_linear


@dataclass(frozen=True)
class Origin:
    """Where a weight lies as it was before it was quantized."""

    file: Path
    key: str

    def read(self) -> Tensor:
        """The weight in float32. Raises BaseModelError where the file is gone."""
        try:
            with safe_open(self.file, framework="pt") as stored:
                return stored.get_tensor(self.key).float()
        except (OSError, SafetensorError) as error:
            raise BaseModelError(
                f"the weight {self.key} before quantization cannot be read from {self.file}: "
                f"{error}"
            ) from error


class QuantizedLinear(nn.Linear):
    """Made by `quantized`, never by itself.

    Attributes:
        quantizer: how the weight is stored.
        stored_dtype: of the weight that it stands for.
        origin: where the weight lies in full; None where that is not known.
    """

    quantizer: Quantizer
    stored_dtype: torch.dtype
    origin: Origin | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        if weight is not None and weight.is_floating_point():  # a trained copy stands in
            return F.linear(x, weight, self.bias)
        return frozen_linear(x, self.packed(), self.bias)

    def packed(self) -> Packed:
        """The weight, as it lies."""
        shape = self.out_features, self.in_features
        kind = self.quantizer
        return Packed(shape, self.stored_dtype, self.stored(), kind.unpack, kind.form())

    def stored(self) -> Stored:
        """The tensors that the weight is stored in, by the quantizer's names."""
        weight = self._parameters["weight"]
        assert weight is not None
        return {
            "weight": weight.detach(),
            **{n: b for n, b in self._buffers.items() if b is not None},
        }

    def store(self, stored: Stored) -> None:
        """Take other stored tensors."""
        self._parameters["weight"] = nn.Parameter(stored["weight"], requires_grad=False)
        for name, tensor in stored.items():
            if name != "weight":
                self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantizer.settings()}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scales follow the device and never the dtype, which is that of the arithmetic."""
        scales, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = scales
        for name, scale in scales.items():
            if scale is not None:
                moved = fn(scale)
                scales[name] = moved if moved.dtype == scale.dtype else _moved(scale, moved.device)
        probe = torch.empty(0, dtype=self.stored_dtype, device=self._parameters["weight"].device)  # type: ignore[union-attr]
        self.stored_dtype = fn(probe).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        shape = self.out_features, self.in_features
        for name, tensor in self.quantizer.entries(self.stored(), shape, self.stored_dtype).items():
            if name != "weight":
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The weight is taken whole or not at all; its shape and settings must be those here."""
        own = {
            key.removeprefix(prefix): state_dict[key]
            for key in list(state_dict)
            if key.startswith(prefix) and key != f"{prefix}bias"
        }
        if not own:
            missing_keys.append(f"{prefix}weight")
        else:
            try:
                stored = self.quantizer.read(own, (self.out_features, self.in_features))
            except BaseModelError as error:
                error_msgs += [f"{prefix}weight: {text}" for text in error.problems]
            else:
                known = self.quantizer.entries(stored, (1, 1), self.stored_dtype)
                unexpected_keys += [prefix + name for name in own if name not in known]
                device = self._parameters["weight"].device  # type: ignore[union-attr]
                self.store({name: tensor.to(device) for name, tensor in stored.items()})
        bias, key = self._parameters.get("bias"), f"{prefix}bias"
        if bias is not None and key not in state_dict:
            missing_keys.append(key)
        elif bias is not None:
            with torch.no_grad():
                bias.copy_(state_dict[key])


def _moved(scale: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device)


def quantized(
    module: nn.Linear, quantizer: Quantizer, stored: Stored, dtype: torch.dtype
) -> QuantizedLinear:
    """The layer, with its weight in other storage. The object stays the same.

    Args:
        stored: what the quantizer made of its weight.
        dtype: of the weight that this stands for.
    """
    module.__class__ = QuantizedLinear
    made: Any = module
    made.quantizer, made.stored_dtype = quantizer, dtype
    made.store(stored)
    return made


def plain(module: nn.Module, weight: Tensor) -> None:
    """The inverse of `quantized`: a layer of plain numbers again, which are `weight`."""
    base = getattr(type(module), "_lorica_base", None)
    assert base is None and isinstance(module, QuantizedLinear), "detach adapters first"
    object.__setattr__(module, "__class__", nn.Linear)
    for name in ("quantizer", "stored_dtype", "origin"):
        module.__dict__.pop(name, None)
    module._buffers.clear()
    module._non_persistent_buffers_set.clear()
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

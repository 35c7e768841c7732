"""One weight, whatever its storage: the only place that knows how numbers may lie.

Attach, merge and the methods ask here. Known are plain tensors, layers that Lorica quantized
(`base.quantized`), the 4-bit and 8-bit layers of bitsandbytes, and tensors that can dequantize
themselves (torchao). Other storages are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorica.base import four_bit
from lorica.base.int8 import Int8
from lorica.base.quantized import QuantizedLinear, plain
from lorica.base.quantizer import Quantizer
from lorica.errors import BaseModelError
from lorica.ops.packed import Packed


def packed_weight(module: nn.Module) -> Packed | None:
    """The packed weight of a layer that Lorica quantized; None for every other layer."""
    if not isinstance(module, QuantizedLinear):
        return None
    weight = module._parameters.get("weight")
    return None if weight is None or weight.is_floating_point() else module.packed()


def read_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The numbers of a parameter in the shape in which the layer computes: the parameter itself,
    not to be written, where it is plain; else a tensor of its own. Where processes hold the base
    together (`base.sharded`), all of them must ask between the passes, or none.

    Raises:
        BaseModelError: it lies in a storage that is not known.
    """
    stored = _stored(module, parameter)
    if is_spread(stored):
        return stored.full_tensor()
    if parameter == "weight" and isinstance(module, QuantizedLinear):
        return module.packed().numbers()
    if parameter == "weight" and (foreign := _bitsandbytes(module, stored)) is not None:
        return foreign.numbers()
    if hasattr(stored, "dequantize") and type(stored).__module__.startswith("torchao"):
        return stored.detach().dequantize()
    if not stored.is_floating_point():
        kind = type(module).__name__
        raise BaseModelError(
            f"the weight of a {kind} lies packed ({stored.dtype}), in a way that is not known",
            expected="plain numbers, or a base quantized by lorica, bitsandbytes or torchao",
            mend="load the base in full precision, with quantize: nf4 or int8 if memory is short",
        )
    return stored


def write_weight(module: nn.Module, parameter: str, value: Tensor, *, pack: bool = False) -> None:
    """Give a parameter other numbers; the place stays what it is for every other module.

    Args:
        value: in the shape in which the layer computes.
        pack: a quantized weight stays quantized; else its layer becomes a plain one.

    Raises:
        BaseModelError: the storage belongs to another library, which does not write it.
    """
    if parameter == "weight" and isinstance(module, QuantizedLinear):
        if pack:
            module.store(module.quantizer.pack(value))
        else:
            plain(module, value)
        return
    stored = _stored(module, parameter)
    if is_packed(module, parameter):
        raise BaseModelError(
            f"the weight of a {type(module).__name__} lies packed and cannot be written",
            mend="merge into the base in full precision, or into one that lorica quantized",
        )
    stored.data.copy_(value)


def hindrance(module: nn.Module, parameter: str = "weight") -> str | None:
    """Why `write_weight` cannot write this parameter; None where it can."""
    stored = _stored(module, parameter)
    if parameter == "weight" and isinstance(module, QuantizedLinear):
        return None
    if is_packed(module, parameter):
        return f"a weight that {_owner(stored)} stores ({stored.dtype}) cannot be written"
    if stored.dtype not in _FLOATS:
        return f"a weight of type {stored.dtype} on {stored.device} cannot be written"
    return None


def rounded_weight(module: nn.Module, value: Tensor) -> Tensor:
    """What is left of numbers when they lie in the storage of a layer that Lorica quantized."""
    assert isinstance(module, QuantizedLinear)
    out = torch.empty_like(value)
    module.quantizer.unpack(module.quantizer.pack(value), out)
    return out


def is_packed(module: nn.Module, parameter: str = "weight") -> bool:
    """Whether a parameter is anything but plain numbers."""
    stored = _stored(module, parameter)
    foreign = type(stored).__module__.split(".")[0] in ("torchao", "bitsandbytes")
    return not stored.is_floating_point() or foreign


def weight_shape(module: nn.Module, parameter: str = "weight") -> tuple[int, ...]:
    """The shape in which a layer computes with a parameter."""
    if parameter == "weight" and is_packed(module) and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(_stored(module, parameter).shape)


def weight_dtype(module: nn.Module, parameter: str = "weight") -> torch.dtype:
    """The dtype of the numbers that a parameter stands for."""
    stored = _stored(module, parameter)
    if parameter == "weight" and isinstance(module, QuantizedLinear):
        return module.stored_dtype
    if parameter == "weight" and (foreign := _bitsandbytes(module, stored)) is not None:
        return foreign.dtype
    return stored.dtype


def storage_of(module: nn.Module, parameter: str = "weight") -> str:
    """How a parameter lies, in a word: its dtype, or that of its quantizer."""
    if parameter == "weight" and isinstance(module, QuantizedLinear):
        return module.quantizer.word
    return str(_stored(module, parameter).dtype).removeprefix("torch.")


def weight_state(module: nn.Module, parameter: str = "weight") -> tuple[int, ...]:
    """Numbers that change when the weight may have: where it lies, and how often it was written."""
    stored = _stored(module, parameter)
    if is_spread(stored):
        stored = stored.to_local()
    return stored.untyped_storage()._cdata if not stored.is_meta else 0, stored._version


def num_parameters(model: nn.Module) -> int:
    """How many numbers the parameters of a model stand for."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sizes[id(parameter)] = torch.Size(weight_shape(module, name)).numel()
    return sum(sizes.values())


def is_spread(stored: Any) -> bool:
    """Whether a tensor lies in several processes, each of which has a share."""
    return hasattr(stored, "full_tensor")


def _owner(stored: Tensor) -> str:
    """The library that a packed tensor comes from."""
    name = type(stored).__module__.split(".")[0]
    return name if name in ("torchao", "bitsandbytes") else "another library"


def _stored(module: nn.Module, parameter: str) -> Any:
    """The parameter as the base has it, also where its name gives an adapted weight."""
    found = module._parameters.get(parameter)
    if found is None:  # computed, as by weight_norm
        found = getattr(module, parameter)
    return found


def _bitsandbytes(module: nn.Module, stored: Any) -> Packed | None:
    """The weight of a layer of bitsandbytes, read by Lorica's own quantizers: the bytes are the
    same.
    """
    if type(stored) in _PLAIN or not type(stored).__module__.startswith("bitsandbytes"):
        return None
    kind: Quantizer
    if (state := getattr(stored, "quant_state", None)) is not None:
        double = state.state2 is not None
        kind = _FOUR_BIT[state.quant_type](state.blocksize, double)
        tensors = {"weight": stored.data, "absmax": state.absmax}
        if double:
            tensors |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
        return Packed(tuple(state.shape), state.dtype, tensors, kind.unpack, kind.form())
    scales = getattr(stored, "SCB", None)
    if scales is None:  # after the first forward pass
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if stored.dtype == torch.int8 and scales is not None:
        tensors = {"weight": stored.data, "SCB": scales}
        return Packed(tuple(stored.shape), torch.float16, tensors, Int8().unpack)
    return None


_PLAIN = (Tensor, nn.Parameter)  # torch.compile cannot ask these for their module
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FOUR_BIT = {"nf4": four_bit.NF4, "fp4": four_bit.FP4}

"""What a method may know of a module: its description as a `Layer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorica.attach.stack import geometry
from lorica.base.ends import end_layer
from lorica.base.quantized import QuantizedLinear
from lorica.base.storage import is_packed, read_weight, weight_state
from lorica.methods.method import Layer


def describe(module: nn.Module, parameter: str | None = None) -> Layer:
    """The layer that `module` is, or the one that its `parameter` is (3-D expert weights, read
    weights).

    A module of an unknown class is of kind "other": it can be copied, nothing else.
    """
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
    if parameter is not None and not convolution and _stored(module, parameter).dim() == 3:
        return _experts(module, parameter)
    # Partials and no closures: a copied model then reads its own weights, and can be pickled.
    weight = partial(_plain, module, parameter or "weight")
    access: dict[str, Any] = {
        "parameters": partial(_copies, module),
        "stored": partial(_view, module, parameter or "weight"),
        "bias_values": partial(_bias, module),
        "state": partial(weight_state, module, parameter or "weight"),
    }
    if isinstance(module, QuantizedLinear):
        origin = module.origin
        access["exact"] = origin.read if origin else None
    access["rounded"] = is_packed(module) if isinstance(module, nn.Linear) else False
    if isinstance(module, nn.Linear):
        width_in, width_out = module.in_features, module.out_features
        return Layer("linear", width_in, width_out, weight, module.bias is not None, **access)
    if isinstance(module, Conv1D):  # GPT-2's: the weight is stored (in, out)
        return Layer("linear", module.nx, module.nf, weight, True, **access)
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))
        vocabulary, width = module.num_embeddings, module.embedding_dim
        return Layer("embedding", vocabulary, width, weight, output_scale=scale, **access)
    if convolution:
        return _convolution(module, weight, access)
    if parameter is not None:  # a bare 2-D parameter, (out, in)
        width_out, width_in = _stored(module, parameter).shape
        more = {"stored": access["stored"], "state": access["state"]}
        return Layer("linear", width_in, width_out, weight, **more)
    if isinstance(module, PreTrainedModel) and (made := describe_model(module)) is not None:
        return made
    inside = [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
    if inside:
        first, last = describe(inside[0]), describe(inside[-1])
        sizes = first.in_features, last.out_features
        return Layer("block", *sizes, partial(torch.empty, 0), parameters=access["parameters"])
    return Layer("other", 0, 0, partial(torch.empty, 0), parameters=access["parameters"])


def describe_model(module: PreTrainedModel) -> Layer | None:
    """The stack of layers of a transformers model, by its embeddings; None where it embeds no
    tokens.
    """
    table = end_layer(module, "get_input_embeddings")
    if not isinstance(table, nn.Embedding):
        return None
    layer = describe(table)
    size = geometry(module)
    return replace(layer, kind="model", geometry=size, parameters=partial(_copies, module))


def is_transposed(module: nn.Module, parameter: str = "weight") -> bool:
    """Whether the stored weight is the transpose of `Layer.weight`."""
    return isinstance(module, Conv1D) or (
        _stored(module, parameter).dim() == 3 and bool(getattr(module, "is_transposed", False))
    )


def to_stored(module: nn.Module, parameter: str, weight: Tensor) -> Tensor:
    """A weight in the layout of `Layer.weight`, laid out as the module stores it."""
    return weight.transpose(-1, -2) if is_transposed(module, parameter) else weight


def _experts(module: nn.Module, parameter: str) -> Layer:
    experts, width_out, width_in = _stored(module, parameter).shape
    if is_transposed(module, parameter):
        width_out, width_in = width_in, width_out
    weight = partial(_plain, module, parameter)
    stored = partial(_view, module, parameter)
    state = partial(weight_state, module, parameter)
    more = {"num_experts": experts, "stored": stored, "state": state}
    return Layer("experts", width_in, width_out, weight, **more)


def _convolution(
    module: nn.Conv1d | nn.Conv2d, weight: Callable[[], Tensor], access: dict[str, Any]
) -> Layer:
    geometry = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "padding_amounts": module._reversed_padding_repeated_twice,
    }
    return Layer(
        "conv1d" if isinstance(module, nn.Conv1d) else "conv2d",
        module.in_channels,
        module.out_channels,
        weight,
        module.bias is not None,
        kernel_size=tuple(module.kernel_size),
        geometry=geometry,
        **access,
    )


def _stored(module: nn.Module, parameter: str) -> Tensor:
    """The parameter as the base has it, also where its name gives an adapted weight."""
    found = module._parameters.get(parameter)
    if found is None:  # computed, as by weight_norm
        found = getattr(module, parameter)
    return found


def _plain(module: nn.Module, parameter: str) -> Tensor:
    """A float32 copy in the layout of `Layer.weight`."""
    numbers = read_weight(module, parameter).detach()
    weight = to_stored(module, parameter, numbers.float())
    return weight.clone(memory_format=torch.contiguous_format)


def _view(module: nn.Module, parameter: str) -> Tensor:
    return to_stored(module, parameter, read_weight(module, parameter).detach())


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def _copies(module: nn.Module) -> dict[str, Tensor]:
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    return {name: read_weight(module, name).detach().float().clone() for name in names}

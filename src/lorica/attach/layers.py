"""What a method may know of a module: its description as a `Layer`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.methods.method import Layer


def describe(module: nn.Module, parameter: str | None = None) -> Layer:
    """The layer that `module` is, or the one that its `parameter` is (3-D expert weights, read weights).

    A module of an unknown class is of kind "other": it can be copied, nothing else.
    """
    if parameter is not None and module._parameters[parameter].dim() == 3:
        return _experts(module, parameter)
    own = {"parameters": lambda: _copies(module)}
    if isinstance(module, nn.Linear):
        return Layer("linear", module.in_features, module.out_features, lambda: _plain(module.weight), module.bias is not None, **own)
    if isinstance(module, Conv1D):  # GPT-2's: the weight is stored (in, out)
        width_in, width_out = module.weight.shape
        return Layer("linear", width_in, width_out, lambda: _plain(module.weight).t().contiguous(), True, **own)
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))
        return Layer(
            "embedding", module.num_embeddings, module.embedding_dim, lambda: _plain(module.weight), output_scale=scale, **own
        )
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _convolution(module)
    if parameter is not None:  # a bare 2-D parameter, (out, in)
        weight = module._parameters[parameter]
        return Layer("linear", weight.shape[1], weight.shape[0], lambda: _plain(module._parameters[parameter]), **own)
    return Layer("other", 0, 0, lambda: torch.empty(0), **own)


def is_transposed(module: nn.Module, parameter: str = "weight") -> bool:
    """Whether the stored weight is the transpose of `Layer.weight`."""
    return isinstance(module, Conv1D) or (
        module._parameters[parameter].dim() == 3 and bool(getattr(module, "is_transposed", False))
    )


def to_stored(module: nn.Module, parameter: str, weight: Tensor) -> Tensor:
    """A weight in the layout of `Layer.weight`, laid out as the module stores it."""
    return weight.transpose(-1, -2) if is_transposed(module, parameter) else weight


def _experts(module: nn.Module, parameter: str) -> Layer:
    shape = module._parameters[parameter].shape
    experts, width_out, width_in = shape if not is_transposed(module, parameter) else (shape[0], shape[2], shape[1])
    return Layer(
        "experts",
        width_in,
        width_out,
        lambda: to_stored(module, parameter, _plain(module._parameters[parameter])).contiguous(),
        num_experts=experts,
    )


def _convolution(module: nn.Conv1d | nn.Conv2d) -> Layer:
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
        lambda: _plain(module.weight),
        module.bias is not None,
        kernel_size=tuple(module.kernel_size),
        geometry=geometry,
        parameters=lambda: _copies(module),
    )


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().float().clone()


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: _plain(p) for name, p in module._parameters.items() if p is not None}

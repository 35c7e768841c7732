"""Activations that are computed again in the backward pass, or wait for it in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from lorica.errors import TrainingError
from lorica.tasks.task import device_of

Checkpointing = Literal["offload"] | bool
"""Whether layers are checkpointed; "offload": what each was given waits in the host's memory."""

_HOOKS = ("_require_grads_hooks", "_require_grads_hook")


def checkpoints(model: nn.Module) -> bool:
    """Whether any part of a model recomputes its activations."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def turn_on(model: Any, how: Checkpointing = True) -> None:
    """Let every layer keep what it is given, and nothing that it computes.

    Raises:
        TrainingError: the model has no checkpointing.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainingError(
            f"{type(model).__name__} has no gradient checkpointing",
            mend="set gradient_checkpointing: false",
        )
    earlier = {name: vars(model)[name] for name in _HOOKS if name in vars(model)}
    model.activation_checkpointing_enable({"use_reentrant": False})
    if hasattr(model, "disable_input_require_grads"):
        # It lets the embeddings ask for gradients, which only reentrant checkpointing needs: layers
        # below the lowest adapter would go through the backward pass, and turning it off leaves
        # the hooks where they are.
        model.disable_input_require_grads()
        vars(model).update(earlier)
    if how == "offload":
        _offload(model)


def _offload(model: nn.Module) -> None:
    """Let what is kept wait in the host's memory: pinned, so that copies do not hold the GPU up.

    Raises:
        TrainingError: no layer says how it is checkpointed.
    """
    pinned = device_of(model).type != "cpu"  # where nothing moves, and nothing can be pinned
    name = "_gradient_checkpointing_func"
    layers = [module for module in model.modules() if vars(module).get(name) is not None]
    if not layers:
        raise TrainingError(
            f"{type(model).__name__} does not let what its layers keep be moved",
            mend="set gradient_checkpointing: true",
        )
    for module in layers:
        vars(module)[name] = partial(_offloaded, vars(module)[name], pinned)


def _offloaded(checkpoint: Callable[..., Any], pinned: bool, *args: Any, **kwargs: Any) -> Any:
    with saved_tensors_hooks(partial(_to_host, pinned), _back):
        return checkpoint(*args, **kwargs)


def _to_host(pinned: bool, tensor: Tensor) -> tuple[torch.device, Tensor]:
    """A copy that the host holds. Copies there and back wait for each other on their stream."""
    pinned = pinned and not isinstance(tensor, FakeTensor)  # without numbers, nothing is pinned
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return tensor.device, copy.copy_(tensor, non_blocking=pinned)


def _back(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, copy = kept
    return copy.to(device, non_blocking=True)


def turn_off(model: Any) -> None:
    """Undo `turn_on`."""
    model.activation_checkpointing_disable()

"""The loss behind an output head: lean where the head is a frozen linear layer and nothing more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorica.ops.cross_entropy import linear_cross_entropy
from lorica.tasks.task import wide

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def head_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of one label per row.

    Args:
        head: its logits are those of the model.
        hidden: (rows, features).
        targets: (rows,), each of them a word.

    Returns:
        (rows,), in float32 or wider.
    """
    if is_plain(head) and not torch.is_autocast_enabled(hidden.device.type):
        weight, bias = head.weight, head.bias
        if hidden.dtype == weight.dtype and hidden.device == weight.device:
            return linear_cross_entropy(hidden, weight, targets, bias)  # type: ignore[arg-type]
    return F.cross_entropy(wide(head(hidden)), targets, reduction="none")


def is_plain(head: Any) -> bool:
    """Whether a head is a frozen linear layer of which nobody has changed or watches anything: no
    adapter, no hook, no forward of its own, no quantized or distributed weight.
    """
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    tensors = [t for t in (head.weight, head.bias) if t is not None]
    frozen = not any(t.requires_grad for t in tensors)
    ordinary = not any(is_traceable_wrapper_subclass(t) for t in tensors)
    return frozen and ordinary and not any(getattr(head, name) for name in _HOOKS)

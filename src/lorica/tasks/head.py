"""The loss behind an output head: lean where the head is a frozen linear layer and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorica.ops.cross_entropy import linear_cross_entropy
from lorica.tasks.task import wide

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def gathered(head: nn.Module | None) -> Iterator[None]:
    """A head that processes hold together (`base.sharded`), whole inside the block. They gather it
    once for a pass, however many adapters one of them has in it.
    """
    if head is None or not is_unit(head):
        yield
        return
    unit: Any = head
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the weights of this module by itself."""
    return hasattr(module, "unshard")


def head_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of one label per row.

    Args:
        head: its logits are those of the model; `gathered`.
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
    own, hooks = type(head), 0
    if is_unit(head):  # a class of FSDP's around that of the head, and a hook on either side
        own, hooks = own.__mro__[2], 1
    if own is not nn.Linear or "forward" in vars(head):
        return False
    tensors = [t for t in (head.weight, head.bias) if t is not None]
    frozen = not any(t.requires_grad for t in tensors)
    ordinary = not any(is_traceable_wrapper_subclass(t) for t in tensors)
    watched = any(len(getattr(head, name)) > hooks for name in _HOOKS)
    return frozen and ordinary and not watched

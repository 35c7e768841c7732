"""Edits of hidden states behind blocks, at the first and the last tokens of every prompt.

The blocks are sites, and so is the stack of layers around them, which holds no tensors: where the
prompts are can only be seen from what the stack is given (`attach.texts`). It is written down once
for a forward pass, for its blocks and for a recomputation of them.

Legend: B rows, L tokens of a row, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.attach.prompt import stacks_of
from lorica.attach.targets import spans
from lorica.attach.texts import texts_of
from lorica.errors import ActivationError, TargetError


def is_intervention(method: Any) -> bool:
    """Whether a method edits what blocks say."""
    return hasattr(method, "intervene")


# --- where they sit -------------------------------------------------------------------------------


def blocks_of(model: nn.Module, method: Any) -> dict[str, nn.Module]:
    """The stack, and behind it the chosen blocks, by path.

    Raises:
        TargetError: the model has no such blocks; all problems at once.
    """
    stacks = stacks_of(model)
    path, stack = next(iter(stacks.items()))
    assert isinstance(stack, PreTrainedModel)
    if len(stacks) > 1:
        raise TargetError(
            f"{method.kind} does not reach encoder-decoder models: what is prompt and what is "
            "answer goes through different blocks"
        )
    number: Any = stack.config.get_text_config()
    count = getattr(number, "num_hidden_layers", None)
    lists = [
        (name, inner)
        for name, inner in stack.named_modules()
        if isinstance(inner, nn.ModuleList) and len(inner) == count
    ]
    if not lists:
        raise TargetError(
            f"{type(stack).__name__} has no list of {count} blocks, one behind another"
        )
    name, blocks = lists[0]
    wanted, problems = set(range(len(blocks))), list[str]()
    if method.layers_to_transform is not None:
        wanted, problems = spans(method.layers_to_transform)
        missing = sorted(wanted - set(range(len(blocks))))
        problems += [f"layers_to_transform: there is no layer {index}" for index in missing]
    if problems:
        raise TargetError("the blocks cannot be chosen", problems=problems)
    head = ".".join(part for part in (path, name) if part)
    return {path: stack, **{f"{head}.{i}": blocks[i] for i in sorted(wanted)}}


# --- which tokens ---------------------------------------------------------------------------------


def locate(
    module: nn.Module, plates: Any, names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """For every acting adapter the tokens that it edits, (B, L, 1); none where a cache is filled:
    then the prompt is over.

    Raises:
        ActivationError: what the task told does not fit what the stack is given.
    """
    texts = texts_of(module, plates.path, plates.status.prompts, args, kwargs)
    if texts is None:
        return {}
    place, sizes = texts.place, texts.sizes
    found = {}
    for name in names:
        own: Any = plates.slots[name].method
        near = (place < own.prefix_positions) | (place >= sizes - own.suffix_positions)
        found[name] = (near & texts.prompts).unsqueeze(-1)
    return found


# --- the edit -------------------------------------------------------------------------------------


def edited(
    plates: Any, names: Sequence[str], output: Any, gate: Callable[[Tensor, Tensor], Tensor]
) -> Any:
    """What a block says, with the edits of the acting adapters.

    Args:
        gate: (weights, hidden states) -> the weights, shaped to multiply the hidden states.

    Raises:
        ActivationError: the block was given other tokens than the stack.
    """
    y = output[0] if isinstance(output, tuple) else output
    result = y
    for name in names:
        where = plates.status.where.get(name)
        if where is None:
            continue
        if y.shape[:-1] != where.shape[:-1]:
            raise ActivationError(
                f"{plates.path}: {tuple(where.shape[:-1])} tokens are in the batch, but this block "
                f"was given {tuple(y.shape[:-1])}",
                mend="activate edits of hidden states apart from virtual tokens",
            )
        slot, route = plates.slots[name], plates.route
        seen = result if route.stacked else y
        edit = slot.method.intervene(seen, slot.tensors) * where.to(y.dtype)
        if route.weights is not None:
            edit = edit * gate(route.weights[..., [route.names.index(name)]], y).to(y.dtype)
        result = result + edit
    return (result, *output[1:]) if isinstance(output, tuple) else result

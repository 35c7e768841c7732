"""Edits of hidden states behind blocks, at the first and the last tokens of every prompt.

The blocks are sites, and so is the stack of layers around them, which holds no tensors: where the
prompts are can only be seen from what the stack is given (masks, the layout of documents, whether a
cache is filled already) and from what the task told (`base.batch`). It is written down once for a
forward pass, for its blocks and for a recomputation of them. A call without a cache, of which no
task told anything, is taken as one prompt.

Legend: B rows, L tokens of a row, T tokens of a flat row of documents, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.attach.prompt import stacks_of
from lorica.attach.stack import takes
from lorica.attach.targets import spans
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
    values = {**dict(zip(takes(module), args, strict=False)), **kwargs}
    cache = values.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        return {}
    given = values.get("input_ids")
    given = values["inputs_embeds"] if given is None else given
    told = plates.status.prompts
    if told is not None and max(told) <= 1:
        raise ActivationError(
            f"{plates.path}: the records have no prompt, and only prompts are edited",
            mend="give records with prompts, and train_on: completion",
        )
    if "documents" in values:
        place, sizes = _in_documents(values, told, given.device)
    else:
        place, sizes = _in_rows(plates.path, values.get("attention_mask"), told, given)
    found = {}
    for name in names:
        own: Any = plates.slots[name].method
        near = (place < own.prefix_positions) | (place >= sizes - own.suffix_positions)
        found[name] = (near & (place >= 0) & (place < sizes)).unsqueeze(-1)
    return found


def _in_rows(
    path: str, mask: Tensor | None, told: Sequence[int] | None, given: Tensor
) -> tuple[Tensor, Tensor]:
    """The number of every token in its record (B, L), -1 for padding; sizes of prompts (B, 1)."""
    if mask is not None and mask.dim() != 2:
        raise ActivationError(
            f"{path}: prompts cannot be found in an attention mask of {mask.dim()} dimensions",
            expected="a mask (rows, tokens)",
            mend="with generate: leave cache_implementation out",
        )
    if mask is None:
        mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    real = mask != 0
    place = (real.cumsum(1) - 1).masked_fill(~real, -1)
    if told is None:
        return place, real.sum(1, keepdim=True)
    if len(told) != given.shape[0]:
        raise ActivationError(f"{path}: {len(told)} prompts were told, for {given.shape[0]} rows")
    return place, torch.tensor(told, device=given.device)[:, None]


def _in_documents(
    values: Mapping[str, Any], told: Sequence[int] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same for a flat row: (1, T), (1, T)."""
    blocks = values["documents"].blocks
    lengths = [length for block in blocks for length in block.lengths]
    prompts = iter(lengths if told is None else told)
    place, sizes = [], []
    for block in blocks:
        for length in block.lengths:
            place += range(length)
            sizes += [next(prompts)] * length
        place += [-1] * (block.size - block.used)
        sizes += [0] * (block.size - block.used)
    return torch.tensor(place, device=device)[None], torch.tensor(sizes, device=device)[None]


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

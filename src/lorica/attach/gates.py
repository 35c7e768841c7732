"""Gates: how far an update is opened, by a mean over the tokens of each text.

The method says what every token gives; here the mean is taken, of each row or packed document by
itself, without padding. A model that continues texts is not to look ahead, so there the mean goes
over the prompt: in training as well as in use, where the first call of a generation is the prompt.
What it said stays with the cache, and holds for all that is generated. Models that read a text at
once (BERT) have no other part than the prompt.

The stack of layers is a site that holds no tensors of most of these methods: it sees where texts
begin and end (`attach.texts`). A model that is none of transformers has no such stack: there every
entry of the first dimension is one text.

Legend: N texts, B rows, L tokens, P virtual tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from lorica.attach.acting import Acting
from lorica.attach.layers import describe
from lorica.attach.prompt import stacks_of
from lorica.attach.stack import takes
from lorica.attach.texts import Texts, texts_of
from lorica.errors import ActivationError, TargetError

_ROUTED = re.compile(r"(^|\.)experts\.\d+\.")
_KEPT = "_lorica_gates"
_PAST = ("past_key_values", "layer_past")
"""What the attention of a layer calls the cache."""


def is_gated(method: Any) -> bool:
    """Whether a gate decides how far a method's update is opened."""
    return hasattr(method, "gate")


# --- where they sit -------------------------------------------------------------------------------


def stack_of(model: nn.Module, method: Any) -> dict[str, nn.Module]:
    """The stack that tells where texts begin and end, by path; none in a model without one.

    Raises:
        TargetError: there are two, or it does not read tokens.
    """
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return {}
    stacks = stacks_of(model)
    if len(stacks) > 1:
        raise TargetError(
            f"{method.kind} does not reach encoder-decoder models: what is prompt and what is "
            "answer goes through different layers"
        )
    return stacks


def attentions_of(model: nn.Module, method: Any) -> dict[str, nn.Module]:
    """The attention of each layer, by path; none where the stack takes no prefix anyway.

    Raises:
        TargetError: the attention of some layer is not found, or the model has two stacks.
    """
    ((path, stack),) = (stack_of(model, method) or stacks_of(model)).items()
    if method.problems(describe(stack)):
        return {}
    config: Any = stack.config
    count = config.get_text_config().num_hidden_layers
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in stack.named_modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and module is not stack and {*_PAST} & {*takes(module)}:
            found[number] = name, module  # the innermost comes last
    if sorted(found) != list(range(count)):
        raise TargetError(
            f"{method.kind} needs the attention of each of the {count} layers of "
            f"{type(stack).__name__}, and finds {len(found)}",
            mend="use prefix-tuning",
        )
    head = f"{path}." if path else ""
    return {head + found[i][0]: found[i][1] for i in range(count)}


# --- the forward pass -----------------------------------------------------------------------------


@dataclass(eq=False)
class Gates:
    """The gates of one forward pass of the stack.

    Attributes:
        texts: where they begin and end; None where a cache is filled.
        kept: by place and adapter, what the gates of every text said of its prompt (N, 1).
    """

    texts: Texts | None
    kept: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def with_gates(
    module: nn.Module, plates: Any, run: Callable[[], Any], args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """Run the stack, whose layers are told of its texts; what gates said goes with its cache.

    Raises:
        ActivationError: the cache was filled without these gates.
    """
    texts = texts_of(module, plates.path, plates.status.prompts, args, kwargs)
    gates = Gates(texts)
    if texts is None:
        values = {**dict(zip(takes(module), args, strict=False)), **kwargs}
        known = getattr(values["past_key_values"], _KEPT, None)
        if known is None:
            raise ActivationError(
                f"{plates.path}: the cache was not filled by this activation, whose gates look at "
                "the prompt",
                mend="begin with an empty cache",
            )
        gates.kept = known
    plates.status.gates = gates
    output = run()
    cache = getattr(output, "past_key_values", None)
    if cache is not None:
        setattr(cache, _KEPT, gates.kept)
    return output


def opened(plates: Any, name: str, each: Tensor) -> Tensor:
    """How far the gate is open for every token, given what each token says (..., 1).

    Raises:
        ActivationError: the layer was given other tokens than the stack.
    """
    gates: Gates | None = plates.status.gates
    if gates is None:
        inner = tuple(range(1, each.dim() - 1))
        return each.mean(inner, keepdim=True) if inner else each
    key, texts = (plates.path, name), gates.texts
    if texts is None:
        means = gates.kept.get(key)
        rows = each.shape[0] if each.dim() > 2 else each.numel()
        if means is None or rows % len(means) or (each.dim() > 2 and rows != len(means)):
            raise _unclear(plates, each)
        return means.repeat_interleave(each.numel() // len(means), 0).view(each.shape).to(each)
    means = _means(plates, each, texts)
    gates.kept[key] = means.detach()
    return means.index_select(0, texts.numbers.reshape(-1)).view(each.shape).to(each.dtype)


def _means(plates: Any, each: Tensor, texts: Texts) -> Tensor:
    """The gate of every text (N, 1), in float32 or wider, by the tokens of its prompt.

    Where a text has none, beside others that have one, its first token decides.
    """
    flat = (texts.place.numel(),)  # as OPT and shared experts lay all tokens of a batch
    if each.shape[:-1] not in (texts.place.shape, flat) or _ROUTED.search(plates.path):
        raise _unclear(plates, each)
    wide = each.reshape(-1, 1) if each.dtype == torch.float64 else each.reshape(-1, 1).float()
    weights = (texts.prompts | (texts.place == 0)).reshape(-1, 1).to(wide.dtype)
    numbers, nothing = texts.numbers.reshape(-1), wide.new_zeros(texts.count, 1)
    sums = nothing.index_add(0, numbers, wide * weights)
    return sums / nothing.index_add(0, numbers, weights).clamp(min=1)  # a row may be all padding


def _unclear(plates: Any, each: Tensor) -> ActivationError:
    return ActivationError(
        f"{plates.path} was given {tuple(each.shape[:-1])} tokens, which are not those of the "
        "batch: the text that each belongs to cannot be seen there",
        mend="leave this layer out with exclude_modules",
    )


# --- prefixes -------------------------------------------------------------------------------------


def open_prefix(
    module: Any, plates: Any, now: Acting, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Open the prefixes in front of one layer, whose attention is about to be called with these.

    The keys and values lie in the cache already. Those of packed documents are shared by all of
    them, so there the gates go on to the function that attends.

    Returns:
        the keyword arguments of the attention.
    """
    texts: Texts | None = plates.status.gates.texts
    if texts is None:
        return kwargs  # they were opened when the cache was filled
    values = {**dict(zip(takes(module), args, strict=False)), **kwargs}
    x = values["hidden_states"]
    means = [_means(plates, method.gate(x, x, tensors), texts) for method, tensors in now.slots]
    if "documents" in values:
        return {**kwargs, "prefix_gate": means[0].index_select(0, texts.numbers.reshape(-1))}
    # a row without a prefix has zeros there, which stay zeros
    both = torch.stack(means)  # (adapters, B, 1)
    rows = torch.arange(texts.count, device=both.device)
    share = both[torch.tensor(now.each(texts.count), device=both.device), rows]
    cache: Any = next(values[name] for name in _PAST if name in values)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layer = own.layers[module.layer_idx]
    share = share.view(-1, 1, 1, 1).to(layer.keys.dtype)
    layer.keys, layer.values = layer.keys * share, layer.values * share
    return kwargs

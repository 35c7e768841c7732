"""Virtual tokens and prefixes: adapters that sit on the stack of layers as a whole.

The stack is a site like any other: its class is swapped, and its forward runs here. The inputs are
made longer, the stack runs, and what it says of the virtual tokens is taken out again, so that
whoever calls it (the head, `generate`, a loss) sees as many places as it gave. Two kinds of stack:

    decoders   [padding, virtual tokens | tokens]     the output without what stands before the bar
    encoders   [virtual tokens | tokens | padding]    the output whole: heads read the first place

The padding makes rows with different numbers of virtual tokens fit into one batch; with the
attention mask, and positions that count from each row's own first virtual token, it changes
nothing. A cache holds the virtual tokens from its first call on; then only masks and positions are
made longer.

Legend: B rows, P virtual tokens (of the row that has most), L tokens, H width, K key-value heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from lorica.attach.acting import Acting
from lorica.attach.layers import describe
from lorica.attach.stack import takes
from lorica.attach.survey import clean
from lorica.errors import ActivationError, TargetError

_SEGMENTS = "token_type_ids"


# --- where they sit -------------------------------------------------------------------------------


def is_prompt(method: Any) -> bool:
    """Whether a method sits on the stack of layers rather than on layers."""
    return hasattr(method, "embeddings") or hasattr(method, "key_values")


def stacks_of(model: nn.Module, method: Any = None) -> dict[str, nn.Module]:
    """The stacks that virtual tokens reach, by path: the first is given them.

    In an encoder-decoder model prompts stand before the source, and the decoder is the second
    stack, which looks at what the encoder made of them; prefixes reach the decoder alone.

    Raises:
        TargetError: the model is none of transformers, or takes no virtual tokens.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"virtual tokens need a model of transformers; this is a {type(model).__name__}"
        )
    found: list[Any] = [_text_stack(model.base_model)]
    if model.config.is_encoder_decoder:
        found = [model.get_encoder(), model.get_decoder()]
        found = found[1:] if hasattr(method, "key_values") else found
    own = takes(found[0])
    problems = []
    if describe(found[0]).kind != "model" or "inputs_embeds" not in own:
        problems.append("it takes no embedded tokens")
    if "cache_params" in own:
        problems.append("it is recurrent: what it keeps of virtual tokens is not handled")
    if problems:
        raise TargetError(f"{type(found[0]).__name__} takes no virtual tokens", problems=problems)
    names = {id(module): path for path, module in model.named_modules()}
    return {clean(names[id(stack)]): stack for stack in found}


def _text_stack(base: Any) -> Any:
    """The stack that reads the text: OPT and models of several senses have one inside."""
    inner = (getattr(base, name, None) for name in ("language_model", "text_model", "decoder"))
    return next((m for m in inner if isinstance(m, PreTrainedModel)), base)


# --- the forward pass of a stack ------------------------------------------------------------------


def run(
    module: Any, forward: Callable[..., Any], now: Acting, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """The stack's own `forward` behind the virtual tokens of `now`."""
    values = {**dict(zip(takes(module), args, strict=False)), **kwargs}
    if not any(tensors for _, tensors in now.slots):
        return forward(**_beside_encoder(values, now))
    shape, device = _shape(values)
    cache, seen = values.get("past_key_values"), 0
    if cache is not None:
        seen = cache.get_seq_length()
    _check(module, values, now, shape, seen)
    if seen:
        _lengthen(values, now, shape, seen, device, positions="position_ids" in takes(module))
        return forward(**values)
    if hasattr(now.slots[0][0], "key_values"):
        output = _run_prefix(module, forward, now, values)
    elif "documents" in values:
        output = _run_packed(module, forward, now, values)
    else:
        output = _run_prompt(module, forward, now, values)
    filled = getattr(output, "past_key_values", None)
    if filled is not None and not torch.compiler.is_compiling():
        filled._lorica_filled_by = now.signature
    return output


def _shape(values: Mapping[str, Any]) -> tuple[tuple[int, int], torch.device]:
    """(B, L) of what the stack is given."""
    given = values.get("input_ids")
    given = values["inputs_embeds"] if given is None else given
    return (given.shape[0], given.shape[1]), given.device


def _check(
    module: Any, values: Mapping[str, Any], now: Acting, shape: tuple[int, int], seen: int
) -> None:
    """Raises ActivationError for what virtual tokens cannot stand in front of."""
    mask, positions = values.get("attention_mask"), values.get("position_ids")
    length = shape[1] + (seen - now.longest if seen else 0)
    fixed = getattr(values.get("past_key_values"), "is_compileable", False)
    if fixed or isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        raise ActivationError(
            f"{now.path}: a static cache, or a mask of its own for every token, has no room for "
            "virtual tokens",
            expected="a cache that grows, and an attention mask (rows, tokens)",
            mend="with generate: leave cache_implementation out",
        )
    other = getattr(values.get("past_key_values"), "_lorica_filled_by", None) != now.signature
    known = not torch.compiler.is_compiling()
    if (mask is not None and mask.shape[1] != length) or (seen and known and other):
        raise ActivationError(
            f"{now.path}: the cache of {seen} places was not filled from its beginning by this "
            f"activation, or the attention mask does not fit it: {length} places are left for it",
            mend="begin with an empty cache; decoding with an assistant is not possible here",
        )
    told = "position_ids" in takes(module) or now.layer.geometry["bidirectional"]
    if not now.even and not told and now.layer.geometry["positions"] is not None:
        raise ActivationError(
            f"{now.path}: rows with different numbers of virtual tokens need positions of their "
            "own, and this stack counts them by itself",
            mend="give all the same num_virtual_tokens, or activate them apart",
        )
    if positions is not None and positions.dim() != 2:
        raise ActivationError(f"{now.path}: positions of several kinds cannot be moved")
    if "documents" in values:
        length = max(max(block.lengths) for block in values["documents"].blocks)
    limit = now.layer.geometry["positions"]
    if limit is not None and length + now.longest > limit:
        raise ActivationError(
            f"{now.path}: {now.longest} virtual tokens and {length} tokens are more than the "
            f"model's {limit} positions",
            mend=f"set max_length to at most {limit - now.longest}",
        )


def _run_prompt(module: Any, forward: Any, now: Acting, values: dict[str, Any]) -> Any:
    (batch, length), device = _shape(values)
    counts, longest = now.counts(batch, device), now.longest
    x = _embedded(module, values)
    parts = [method.embeddings(tensors).to(x.dtype) for method, tensors in now.slots]
    values["inputs_embeds"] = torch.cat([now.stacked(parts, batch, 0), x], 1)
    if values.get(_SEGMENTS) is not None:
        own = values[_SEGMENTS]
        values[_SEGMENTS] = torch.cat([own.new_zeros(own.shape[0], longest), own], 1)
    values["attention_mask"] = _longer_mask(values, now, counts, length)
    if now.layer.geometry["bidirectional"]:
        _roll(values, now, counts, length)
        if values.get("position_ids") is not None:
            first = torch.arange(longest, device=device).expand(batch, -1)
            values["position_ids"] = torch.cat([first, values["position_ids"] + longest], 1)
        return forward(**values)
    if "position_ids" in takes(module):
        values["position_ids"] = _positions(values, now, counts, length, 0, with_prompt=True)
    return _without(forward(**values), longest)


def _run_packed(module: Any, forward: Any, now: Acting, values: dict[str, Any]) -> Any:
    """Several documents in one row: the virtual tokens stand in front of each."""
    if now.rows is not None:
        raise ActivationError(f"{now.path}: documents in one row share their virtual tokens")
    ((method, tensors),) = now.slots
    x = _embedded(module, values)
    longer = values["documents"].lengthened(now.longest)
    both = torch.cat([x[0], method.embeddings(tensors).to(x.dtype)])
    values["inputs_embeds"] = both.index_select(0, longer.source)[None]
    values["documents"], values["position_ids"] = longer.documents, longer.positions[None]
    output = forward(**values)
    output.last_hidden_state = output.last_hidden_state.index_select(1, longer.kept)
    return output


def _embedded(module: Any, values: dict[str, Any]) -> Tensor:
    """The embedded tokens (B, L, H); they take the place of the token ids."""
    ids = values.pop("input_ids", None)
    given = values.get("inputs_embeds")
    return module.get_input_embeddings()(ids) if given is None else given


def _roll(values: dict[str, Any], now: Acting, counts: Tensor, length: int) -> None:
    """Move the padding of every row from its front to its end."""
    if now.even:
        return
    index = _behind(now, counts, length)
    for name in ("inputs_embeds", "attention_mask", _SEGMENTS):
        if (own := values.get(name)) is not None:
            wide = index.view(*index.shape, *[1] * (own.dim() - 2)).expand(-1, -1, *own.shape[2:])
            values[name] = own.gather(1, wide)


def _behind(now: Acting, counts: Tensor, length: int) -> Tensor:
    """For every place the one that is moved there (B, P + L)."""
    total = now.longest + length
    steps = torch.arange(total, device=counts.device)
    return (steps + (now.longest - counts)[:, None]) % total


def _longer_mask(
    values: Mapping[str, Any],
    now: Acting,
    counts: Tensor,
    length: int,
    name: str = "attention_mask",
) -> Tensor | None:
    """The mask with P places in front (B, P + L): 1 for virtual tokens, 0 for their padding."""
    mask = values.get(name)
    if mask is None and now.even:
        return None
    if mask is None:
        mask = counts.new_ones(counts.shape[0], length)
    steps = torch.arange(now.longest, device=counts.device)
    front = steps >= (now.longest - counts)[:, None]
    return torch.cat([front.to(mask.dtype), mask], 1)


def _positions(
    values: Mapping[str, Any],
    now: Acting,
    counts: Tensor,
    length: int,
    seen: int,
    *,
    with_prompt: bool = False,
) -> Tensor | None:
    """Positions counted from each row's first virtual token; None where the stack's own are right.

    Args:
        seen: tokens in the cache, without virtual ones.
        with_prompt: those of the virtual tokens in front.
    """
    own = values.get("position_ids")
    if own is None and now.even:
        return None
    if own is None:
        own = (torch.arange(length, device=counts.device) + seen)[None]
    moved = own.expand(counts.shape[0], -1) + counts[:, None]
    if not with_prompt:
        return moved
    steps = torch.arange(now.longest, device=counts.device)
    front = (steps - (now.longest - counts)[:, None]).clamp(min=0)
    return torch.cat([front.to(moved.dtype), moved], 1)


def _lengthen(
    values: dict[str, Any],
    now: Acting,
    shape: tuple[int, int],
    seen: int,
    device: torch.device,
    *,
    positions: bool,
) -> None:
    """A call whose cache holds the virtual tokens already."""
    batch, length = shape
    counts, before = now.counts(batch, device), seen - now.longest
    values["attention_mask"] = _longer_mask(values, now, counts, before + length)
    if positions:
        values["position_ids"] = _positions(values, now, counts, length, before)


def _without(output: Any, count: int) -> Any:
    """The output of a stack without its first places."""
    if isinstance(output, tuple):
        return (output[0][:, count:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, count:]
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(h[:, count:] for h in output.hidden_states)
    return output


def _beside_encoder(values: dict[str, Any], now: Acting) -> dict[str, Any]:
    """What a decoder is given that looks at an encoder with virtual tokens: its mask is longer."""
    seen, mask = values.get("encoder_hidden_states"), values.get("encoder_attention_mask")
    if seen is None or (mask is None and now.even):
        return values
    length = seen.shape[1] - now.longest
    counts = now.counts(seen.shape[0], seen.device)
    longer = _longer_mask(values, now, counts, length, "encoder_attention_mask")
    assert longer is not None
    if not now.even:
        longer = longer.gather(1, _behind(now, counts, length))
    return {**values, "encoder_attention_mask": longer}


# --- prefixes -------------------------------------------------------------------------------------


def _run_prefix(module: Any, forward: Any, now: Acting, values: dict[str, Any]) -> Any:
    _refuse_checkpointing(module, now)
    (batch, length), device = _shape(values)
    counts = now.counts(batch, device)
    given = values.get("past_key_values")
    cache = _empty_cache(module, values) if given is None else given
    dtype = module.get_input_embeddings().weight.dtype
    parts = [method.key_values(tensors, now.layer).to(dtype) for method, tensors in now.slots]
    pairs = now.stacked(parts, batch, 3)  # (B, layers, 2, K, P, D)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for number in range(pairs.shape[1]):
        own.update(pairs[:, number, 0], pairs[:, number, 1], number)
    values["past_key_values"] = cache
    if now.layer.geometry["bidirectional"]:
        values["attention_mask"] = _whole_mask(values, now, counts, length, dtype)
        return forward(**values)
    if "documents" in values and now.rows is not None:
        raise ActivationError(f"{now.path}: documents in one row share their prefix")
    values["attention_mask"] = _longer_mask(values, now, counts, length)
    if "position_ids" in takes(module):
        values["position_ids"] = _positions(values, now, counts, length, 0)
    output = forward(**values)
    if given is None and values.get("use_cache") is False and not isinstance(output, tuple):
        output.past_key_values = None  # nobody asked for one
    return output


def _empty_cache(module: Any, values: Mapping[str, Any]) -> Cache:
    """As the stack would make it for itself."""
    if values.get("encoder_hidden_states") is None:
        return DynamicCache(config=module.config)
    return EncoderDecoderCache(
        DynamicCache(config=module.config), DynamicCache(config=module.config)
    )


def _whole_mask(
    values: Mapping[str, Any], now: Acting, counts: Tensor, length: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores of an encoder (B, 1, L, P + L), which expects no cache."""
    if not now.even:
        raise ActivationError(
            f"{now.path}: prefixes of different lengths cannot act in one batch of an encoder",
            mend="give them the same num_virtual_tokens, or activate them apart",
        )
    mask = _longer_mask(values, now, counts, length)
    if mask is None:
        mask = counts.new_ones(counts.shape[0], now.longest + length)
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    added = added.masked_fill(mask == 0, torch.finfo(dtype).min)
    return added[:, None, None, :].expand(-1, 1, length, -1)


def _refuse_checkpointing(module: Any, now: Acting) -> None:
    if module.training and any(
        getattr(m, "gradient_checkpointing", False) for m in module.modules()
    ):
        raise ActivationError(
            f"{now.path}: gradient checkpointing takes the cache away, and a prefix with it",
            mend="set gradient_checkpointing: false, or use prompt-tuning",
        )

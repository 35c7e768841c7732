"""What a model allows, found out by running it once: packed documents, and a head of its own.

A table of architectures would be wrong with the next release of transformers; a comparison of
logits is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.tasks.documents import NAME, NotSupported
from lorica.tasks.last_layer import LastLayer, Place, Seen, keep_rows, noting, places
from lorica.tasks.layout import lay_out
from lorica.tasks.task import answering, device_of
from lorica.tasks.texts import takes_segments, text_inputs

_LENGTHS = (7, 5, 9)
"""Tokens of the documents that are compared: odd, different, the longest not first."""

_SHOWN_BY_SHORT = frozenset(
    {"full_attention", "sliding_attention", "linear_attention", "hybrid", "hybrid_sliding"}
    | {"conv", "moe", "dense", "sparse"}
)
"""Kinds of layers that treat short documents as long ones, or whose window is handed on."""


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Run the block with another attention function, and put the model's own back."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packing_fault(model: Any, *, longest: int | None = None) -> str | None:
    """Why documents cannot share a row of `model`; None where packed equals separate on three short
    documents.

    Args:
        longest: no document will have more tokens; None: they may have any number.
    """
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        return "it is no model of transformers"
    if (fault := _local_attention(model.config.get_text_config(), longest)) is not None:
        return fault
    settable = getattr(model, "_can_set_attn_implementation", None)
    if settable is not None and not settable():  # asking it anyway would be logged
        return "it does not take another attention function"
    own = model.config._attn_implementation
    generator = torch.Generator().manual_seed(0)
    vocabulary, device = model.config.get_text_config().vocab_size, device_of(model)
    texts = [
        torch.randint(1, min(vocabulary, 1000), (n,), generator=generator).to(device)
        for n in _LENGTHS
    ]
    try:
        with answering(model):
            alone = torch.cat([model(t[None], use_cache=False).logits[0] for t in texts]).float()
            with attention(model, NAME):
                if model.config._attn_implementation != NAME:
                    return "it does not take another attention function"
                documents, _, positions = lay_out([_LENGTHS])
                ids = torch.zeros(len(positions), dtype=torch.long, device=device)
                ids[: sum(_LENGTHS)] = torch.cat(texts)
                layout = {
                    "position_ids": positions[None].to(device),
                    "documents": documents.to(device),
                }
                packed = model(ids[None], **layout, use_cache=False).logits[0, : sum(_LENGTHS)]
    except _FAULTS as error:
        return (str(error) or type(error).__name__).splitlines()[0][:120]
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    apart = _apart(model, packed, alone)
    return None if apart is None else f"packed documents see each other (logits differ by {apart})"


def beginnings_fault(model: Any) -> str | None:
    """Why documents cannot go on behind one beginning in a `model` that packs; None where that
    gives what each gives alone.
    """
    lengths, behind = (7, 4, 5, 9), (None, 0, None, 0)  # two go on behind the first
    vocabulary, device = model.config.get_text_config().vocab_size, device_of(model)
    documents, _, positions = lay_out([lengths], behind=[behind])
    flat = 1 + torch.arange(len(positions)) * 7 % (min(vocabulary, 1000) - 1)
    parts = flat[: sum(lengths)].split(lengths)
    whole = [torch.cat([parts[0], parts[1]]), parts[2], torch.cat([parts[0], parts[3]])]
    try:
        with answering(model):
            alone = [model(t[None].to(device), use_cache=False).logits[0] for t in whole]
            wanted = torch.cat([alone[0], alone[1], alone[2][lengths[0] :]])
            with attention(model, NAME):
                inputs: dict[str, Any] = {"position_ids": positions[None].to(device)}
                inputs["documents"] = documents.to(device)
                made = model(flat[None].to(device), **inputs, use_cache=False).logits[0]
    except _FAULTS as error:
        return (str(error) or type(error).__name__).splitlines()[0][:120]
    apart = _apart(model, made[: sum(lengths)], wanted)
    return None if apart is None else f"it gives something else (logits differ by {apart})"


def _apart(model: Any, ours: Tensor, theirs: Tensor) -> str | None:
    """How far numbers of `model` are apart, where that is more than rounding."""
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    theirs = theirs.float()
    tolerance = (1e-4 if exact else 5e-2) * max(1.0, theirs.abs().max().item())
    worst = (ours.float() - theirs).abs().max().item()
    return None if worst <= tolerance else f"{worst:.2g}"  # also where it is NaN


_FAULTS = (
    NotSupported,
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    LoricaError,
)
"""What a model may raise that is given what it does not expect."""


def place_of_rows(model: Any) -> Place | None:
    """Where rows that nobody reads may leave a model that packs; None where logits of the others
    would not be the same, or where it has no such place.
    """
    lengths = (*_LENGTHS, 13)  # more rows than go on
    documents, _, positions = lay_out([lengths])
    device = device_of(model)
    wanted = torch.tensor([3, 6, 7, 20, sum(lengths) - 1])
    kept = keep_rows(documents, [wanted])
    assert kept is not None
    kept, wanted, seen = kept.to(device), wanted.to(device), Seen()
    vocabulary = model.config.get_text_config().vocab_size
    inputs: dict[str, Any] = {
        "input_ids": (1 + torch.arange(len(positions)) * 7 % (min(vocabulary, 1000) - 1))[None],
        "position_ids": positions[None],
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    documents = documents.to(device)
    with answering(model), attention(model, NAME):
        try:
            with noting(model, seen):
                noted = replace(documents, seen=seen)
                whole = model(**inputs, documents=noted, use_cache=False).logits[0, wanted]
            for place in places(model, seen):
                last = LastLayer(model, place)
                if place.projection is None or last.adapted(model, now=True):
                    continue
                with last.running():
                    last.kept = kept
                    less = model(**inputs, documents=documents, use_cache=False).logits[0]
                if _apart(model, less[kept.chosen[0]], whole) is None:
                    return place
        except _FAULTS:
            return None
    return None


def packing_texts(model: Any) -> tuple[str | None, Place | None]:
    """Why texts that are to be classified cannot share a row of `model`, or where the rows that
    its head reads leave it: where the classes of packed texts are those of each alone.
    """
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        return "it is no model of transformers", None
    settable = getattr(model, "_can_set_attn_implementation", None)
    if settable is not None and not settable():
        return "it does not take another attention function", None
    own, config = model.config._attn_implementation, model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    lengths = (7, 5, min(max(9, window + 7), _LONGEST_TRIED))
    ids = [
        [1 + (7 * i + n) % (min(config.vocab_size, 1000) - 1) for i in range(n)] for n in lengths
    ]
    segments = [[int(2 * i > n) for i in range(n)] for n in lengths]
    segments = segments if takes_segments(model) else [[] for _ in lengths]
    try:
        inputs, _, kept = text_inputs([ids], [segments], model)
        with answering(model):
            alone = torch.cat([_class_of(model, i, s) for i, s in zip(ids, segments, strict=True)])
            with attention(model, NAME):
                if model.config._attn_implementation != NAME:
                    return "it does not take another attention function", None
                seen = Seen()
                documents = inputs["documents"]
                with noting(model, seen):
                    model(**(inputs | {"documents": replace(documents, seen=seen)}))
                fault = "it has no list of layers that each run once"
                for place in places(model, seen):
                    last = LastLayer(model, place)
                    with last.running():
                        last.kept = kept
                        logits = model(**inputs).logits
                    if logits.shape[0] != len(kept.rows):
                        return "its head does not take texts of one token", None
                    apart = _apart(model, logits[kept.chosen[0]], alone)
                    if apart is None:
                        return None, place
                    fault = f"packed texts see each other (logits differ by {apart})"
                return fault, None
    except _FAULTS as error:
        return (str(error) or type(error).__name__).splitlines()[0][:120], None
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)


_LONGEST_TRIED = 600
"""Tokens of a text that is to be longer than a window of attention."""


def _class_of(model: Any, ids: list[int], segments: list[int]) -> Tensor:
    """Logits (1, classes) of one text."""
    device = device_of(model)
    inputs = {"input_ids": torch.tensor([ids], device=device)}
    if segments:
        inputs["token_type_ids"] = torch.tensor([segments], device=device)
    return model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits.float()


def _local_attention(config: Any, longest: int | None) -> str | None:
    """Why long documents would be attended to otherwise than alone, which three short ones do not
    show: attention in chunks or in a selection of tokens is a mask that is not handed on.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or (["chunked_attention"] if chunk else []))
    kinds -= _SHOWN_BY_SHORT
    if kinds == {"chunked_attention"} and chunk and longest is not None and longest <= chunk:
        return None
    if kinds == {"chunked_attention"}:
        return (
            f"its attention is in chunks of {chunk:,} tokens, and documents may be longer; with "
            f"max_length: {chunk} they could be packed"
        )
    return (
        f"its layers attend in a way of their own ({', '.join(sorted(kinds))})" if kinds else None
    )


def decoded(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the decoder of an encoder-decoder model says, before the head (records, tokens, D)."""
    mask = inputs["attention_mask"]
    source = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask)
    made = model.get_decoder()(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=source.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
    )
    return made.last_hidden_state


def plain_decoder_head(model: Any) -> nn.Module | None:
    """As `plain_head`, of an encoder-decoder model: where its logits are head(decoded(...))."""
    device = device_of(model)
    ids = torch.arange(1, 15, device=device).view(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    try:
        head = model.get_output_embeddings()
        with answering(model):
            wanted = model(**inputs, use_cache=False).logits
            same = torch.equal(head(decoded(model, inputs)), wanted)
    except (TypeError, AttributeError, RuntimeError, ValueError, LookupError, LoricaError):
        return None  # also where other adapters act on each row of a batch
    return head if same else None


def plain_head(model: Any) -> nn.Module | None:
    """The output head, where logits are exactly head(hidden states); None where the model does
    more.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", None)
    if head is None or backbone is None or backbone is model:
        return None
    ids = torch.arange(1, 8, device=device_of(model))[None]
    try:
        with answering(model):
            wanted = model(ids, use_cache=False).logits
            hidden = backbone(ids, use_cache=False).last_hidden_state
            same = torch.equal(head(hidden), wanted)
    except (TypeError, AttributeError, RuntimeError):
        return None
    return head if same else None

"""A tokenizer in the words of GGUF, for the two kinds that llama.cpp has for text models.

    tokenizer.ggml.model "gpt2"     byte-level BPE: tokens, merges, and how text is cut beforehand
    tokenizer.ggml.model "llama"    BPE of SentencePiece with bytes to fall back on: tokens, scores

What is found out and not looked up: whether texts begin with a token or a space of their own, and
which merges a vocabulary really has. How text is cut is compared by the regular expression itself,
so a vocabulary that was made anew is served too, and an expression that llama.cpp does not have is
refused: another cut would give other tokens, without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lorica.errors import AdapterFileError
from lorica.files.gguf_names import package

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CUTS = {
    (_GPT2, False): "gpt-2",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_LLAMA3.replace("{1,3}", ""), False): "qwen2",
    (r"\p{N}", _GPT2, False): "smollm",
}
"""(Regular expressions in their order, whether whole tokens come before merges) -> llama.cpp's name
of the cut."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL = ("bos", "eos", "unk", "pad")


_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Tokens without which llama.cpp refuses a model that calls itself phi3."""


def model_name(wanted: str, tokenizer: Any) -> str:
    """The name of a model in its file, of which llama.cpp reads whether blanks behind special
    tokens belong to them, as with Phi 3: with "phi3" or "phi-3" in it where the tokenizer says so
    too, and without where it does not.
    """
    known = tokenizer.get_vocab()
    strips = [t.rstrip for t in tokenizer.added_tokens_decoder.values() if t.content == "</s>"]
    like_phi3 = all(token in known for token in _PHI3) and any(strips)
    says_so = re.search("phi-?3", wanted, re.IGNORECASE) is not None
    if like_phi3 and not says_so:
        return f"phi3 {wanted}"
    return wanted if like_phi3 else re.sub("phi-?3", "model", wanted, flags=re.IGNORECASE)


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Write a tokenizer into the metadata.

    Args:
        writer: a gguf.GGUFWriter.
        tokenizer: of transformers, on top of the package tokenizers.
        size: rows of the model's embedding; tokens that are lacking are filled up.

    Raises:
        AdapterFileError: llama.cpp has no tokenizer that gives the same tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise AdapterFileError(
            f"{type(tokenizer).__name__} cannot be written as GGUF",
            expected="a tokenizer with a tokenizer.json",
        )
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise AdapterFileError(
            f"a tokenizer of type {model['type']} is not written as GGUF", expected="BPE"
        )
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _cut(content, merges))
    tokens, kinds = _tokens(tokenizer, content, size)
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(tokens, kinds, merges))
        writer.add_add_space_prefix(_begins_with_space(tokenizer))
    writer.add_token_types(kinds)
    if not pieces:
        writer.add_token_merges(merges)
    for name in _SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and encoded[-1] == tokenizer.eos_token_id
    )
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _tokens(tokenizer: Any, content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens, in the order of their numbers."""
    by_index = {index: text for text, index in tokenizer.get_vocab().items()}
    added = {one["id"]: one for one in content["added_tokens"]}
    if over := [text for index, text in by_index.items() if index >= size]:
        raise AdapterFileError(
            f"{len(over)} tokens have no row in the model's embedding, such as {over[0]!r}",
            expected=f"numbers below {size}",
            mend="resize the embedding to the tokenizer",
        )
    kind = package().TokenType
    tokens, kinds = [], []
    for index in range(size):
        text = by_index.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]")
            kinds.append(kind.UNUSED)
        elif index in added:
            tokens.append(text if added[index]["special"] else text.replace("\u2581", " "))
            kinds.append(kind.CONTROL if added[index]["special"] else kind.USER_DEFINED)
            if text == getattr(tokenizer, "unk_token", None):
                kinds[-1] = kind.UNKNOWN
        else:
            tokens.append(text)
            fallback = content["model"].get("byte_fallback") and _BYTE.fullmatch(text)
            kinds.append(kind.BYTE if fallback else kind.NORMAL)
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair whose whole has the best score: the order of the merges."""
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), position)
    return [
        float(-rank[t]) if t in rank else -1000.0 * (k != 1)
        for t, k in zip(tokens, kinds, strict=True)
    ]


def _begins_with_space(tokenizer: Any) -> bool:
    """Whether a text gets a space in front of its first word."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    return str(tokenizer.convert_ids_to_tokens(bare)[0]).startswith("\u2581")


def _cut(content: Mapping[str, Any], merges: list[str]) -> str:
    """llama.cpp's name of how text is cut before merging."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    found: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and "Regex" in step["pattern"]:
            found.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        elif kind == "ByteLevel":
            found += [_GPT2] if step.get("use_regex", True) else []
        else:
            found.append(str(kind))
    key = (*found, bool(content["model"].get("ignore_merges")))
    joined = any(c.isdigit() for merge in merges for c in merge) or any(
        set(merge) <= {" ", "\u0120"} for merge in merges
    )
    if key == (_DIGITS, False) and not joined:
        return "smollm"  # the cuts differ at digits and runs of spaces, which are never merged here
    if key not in CUTS:
        raise AdapterFileError(
            "llama.cpp has no tokenizer known here that cuts text as this one",
            problems=[f"it cuts by {text[:200]}" for text in found],
            expected=f"the cut of {', '.join(CUTS.values())}, or BPE with byte fallback",
        )
    return CUTS[key]

"""llama.cpp's names of a model's weights, and the order in which it keeps their rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorica.errors import AdapterFileError, MissingPackage, nearest


@dataclass(frozen=True)
class Architecture:
    """A model family as llama.cpp sees it.

    Attributes:
        name: general.architecture.
        permuted: whether the rows of query and key are reordered, from halves of a head to pairs,
            for the other way of writing rotary embeddings.
        norm_shift: what llama.cpp's norm weights have on top of the model's own.
        has_output: whether it has an output matrix of its own, where that is not tied.
    """

    name: str
    permuted: bool = False
    norm_shift: float = 0.0
    has_output: bool = True


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_shift=1.0, has_output=False),
    "gemma2": Architecture("gemma2", norm_shift=1.0, has_output=False),
    "gemma3_text": Architecture("gemma3", norm_shift=1.0),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2"),
}
"""`config.model_type` -> the architecture."""


def architecture_of(model: nn.Module) -> Architecture:
    """What llama.cpp calls this family. Raises AdapterFileError where it is not known here."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    near = nearest(str(kind), ARCHITECTURES)
    raise AdapterFileError(
        f"GGUF is not written for {kind or type(model).__name__}",
        expected=f"a model of {', '.join(ARCHITECTURES)}",
        mend=f"{near} is the nearest of them" if near else None,
    )


def package() -> Any:
    """The package that knows the format. Raises MissingPackage."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackage.of("gguf", "gguf", "GGUF") from error
    return gguf


def names_of(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Path of a parameter, such as model.norm.weight -> llama.cpp's name of it.

    Paths that llama.cpp has no name for are left out.
    """
    gguf = package()
    arch = architecture_of(model)
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    config: Any = model.config
    table = gguf.get_tensor_name_map(number, config.get_text_config().num_hidden_layers)
    found = {}
    for path in paths:
        name = table.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is not None:
            found[path] = name
    return found


def heads_of(model: nn.Module, name: str) -> int | None:
    """How many heads the rows of a weight are reordered in; None where they keep their order."""
    if not architecture_of(model).permuted:
        return None
    config: Any = model.config
    kind = name.rpartition(".")[0].rpartition(".")[2]  # blk.0.attn_q.weight -> attn_q
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(kind)


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads, 2, half) as (heads, half, 2): what belongs to one rotation lies together."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_pairs`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()

"""The attention that PEFT tuned by hand is given in gpu_sides.py: over packed documents."""

from importlib.util import find_spec
from typing import Any

from torch import Tensor


def attention_of(device: str) -> str:
    """The fastest attention over packed documents that transformers can be given here."""
    if device == "cpu":
        return "sdpa"
    if find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return register_varlen()


def register_varlen() -> str:
    """Torch's own flash attention over documents, for where the flash-attn package is missing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("varlen", varlen)
    AttentionMaskInterface.register("varlen", lambda **_: None)
    return "varlen"


def varlen(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (tokens, heads, width)
    ends, longest = given["cu_seq_lens_q"], given["max_length_q"]
    how = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    return varlen_attn(q, k, v, ends, ends, longest, longest, **how)[None], None  # type: ignore[index]

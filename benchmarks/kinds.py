"""Operations of a profile, summed by kind."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, tuple[str, ...]] = {
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "logsumexp"),
    "attention": ("attention", "softmax"),
    "optimizer, clipping": ("adamw", "_foreach", "linalg_vector_norm"),
    "moving data": (
        "copy_",
        "cat",
        "index",
        "gather",
        "scatter",
        "embedding",
        "clone",
        "fill_",
        "zero_",
        "stack",
    ),
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm")
ARITHMETIC = "sums, norms, activations"


def kind_of(name: str, shapes: list[Any], rank: int) -> str:
    """Of an operation (`aten::mm`) with the shapes of its inputs, in a model with an adapter of
    this rank. A product is the adapter's where a side is the rank, or that of two or three layers
    that are multiplied as one.
    """
    if name in ("aten::bmm", "aten::baddbmm"):
        return "attention"  # nothing else in these models multiplies batches
    if name in PRODUCTS:
        sizes = {size for shape in shapes if len(shape) >= 2 for size in shape[-2:]}
        thin = sizes & {rank, 2 * rank, 3 * rank}
        return "thin products of the adapter" if thin else "products of the base"
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return ARITHMETIC


def seconds_by_kind(profile: Any, rank: int) -> dict[str, float]:
    """Of a `torch.profiler.profile` with shapes: seconds that operations spent themselves."""
    found: dict[str, float] = {}
    for row in profile.key_averages(group_by_input_shape=True):
        if row.key.startswith("aten::"):
            kind = kind_of(row.key, row.input_shapes, rank)
            found[kind] = found.get(kind, 0.0) + row.self_cpu_time_total / 1e6
    return found

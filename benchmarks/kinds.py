"""Operations of a profile, summed by kind."""

from __future__ import annotations

from typing import Any

THIN = 128
"""A product with a side up to this is one of the adapter's: ranks are small, layers are not."""

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "softmax"),
    "optimizer, clipping": ("adamw", "_foreach", "linalg_vector_norm"),
    "loss": ("nll_loss", "cross_entropy", "logsumexp"),
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


def kind_of(name: str, shapes: list[Any]) -> str:
    """Of an operation (`aten::mm`) with the shapes of its inputs."""
    if name in PRODUCTS:
        sizes = [size for shape in shapes if len(shape) >= 2 for size in shape[-2:]]
        if name == "aten::bmm" or name == "aten::baddbmm":
            return "attention"  # nothing else in these models multiplies batches
        return "thin products of the adapter" if min(sizes) <= THIN else "products of the base"
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return ARITHMETIC


def seconds_by_kind(profile: Any) -> dict[str, float]:
    """Of a `torch.profiler.profile` with shapes: seconds of each operation itself."""
    found: dict[str, float] = {}
    for row in profile.key_averages(group_by_input_shape=True):
        if row.key.startswith("aten::"):
            kind = kind_of(row.key, row.input_shapes)
            found[kind] = found.get(kind, 0.0) + row.self_cpu_time_total / 1e6
    return found

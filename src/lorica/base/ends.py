"""The layers at the two ends of a model of transformers: its embedding and its output layer."""

from __future__ import annotations

from torch import nn


def end_layer(model: nn.Module, getter: str = "get_output_embeddings") -> nn.Module | None:
    """The layer at one end of a model of transformers; None where it has no such layer."""
    get = getattr(model, getter, None)
    try:
        return get() if get is not None else None
    except (NotImplementedError, AttributeError):  # some models have the method, but no such layer
        return None

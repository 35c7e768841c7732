"""How the entries of a weight's matrix fall into groups: entries, neurons, heads, or all of them.

Legend: O rows of outputs, I columns of inputs, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorica.attach.survey import ends
from lorica.errors import ConfigError
from lorica.methods.ia3 import ATTENTION_OUTPUT
from lorica.methods.update import matrix_shape
from lorica.train.choice import Question


@dataclass(frozen=True)
class Grouping:
    """Groups of equal size.

    Attributes:
        shape: of the matrix, or of the stack of matrices.
        split: the matrix seen so that each group lies along whole dimensions.
        kept: the dimensions of `split` that count the groups.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many groups there are."""
        return math.prod(self.split[i] for i in self.kept)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Entries of one group."""
        return self.numel // self.count

    def sum(self, matrix: Tensor) -> Tensor:
        """The sum of each group (count,)."""
        gone = tuple(i for i in range(len(self.split)) if i not in self.kept)
        whole = matrix.reshape(self.split)
        return (whole.sum(gone) if gone else whole).reshape(-1)

    def entries(self, mask: Tensor) -> Tensor:
        """Ascending numbers of all entries of the groups that a mask (count,) takes."""
        ones = [length if i in self.kept else 1 for i, length in enumerate(self.split)]
        return mask.view(ones).expand(self.split).reshape(-1).nonzero().flatten()


def grouping_of(question: Question, path: str, granularity: str) -> Grouping:
    """How the entries at a place are grouped.

    Raises:
        ConfigError: heads are wanted of a layer that has none.
    """
    shape = matrix_shape(question.layers[path])
    if granularity == "weight":
        return Grouping(shape, shape, tuple(range(len(shape))))
    if granularity == "row":
        return Grouping(shape, shape, tuple(range(len(shape) - 1)))
    if granularity == "head":
        return _by_heads(question, path, shape)
    return Grouping(shape, (1, *shape), (0,))


def _by_heads(question: Question, path: str, shape: tuple[int, ...]) -> Grouping:
    """Rows of the projections into attention, columns of the one out of it."""
    width = head_width(question.model)
    out = any(ends(path, name) for name in ATTENTION_OUTPUT)
    length = shape[-1] if out else shape[-2]
    attention = any(word in path.lower() for word in ("attention", "attn"))
    if width is None or len(shape) != 2 or not attention or length % width:
        raise ConfigError(
            f"granularity=head: {path} is no layer of attention whose heads are known",
            mend="set target_modules: attention, or choose granularity: row",
        )
    heads = length // width
    if out:
        return Grouping(shape, (shape[0], heads, width), (1,))
    return Grouping(shape, (heads, width, shape[1]), (0,))


def head_width(model: nn.Module) -> int | None:
    """Features of one head of attention, as the model's config says; None where it does not."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for key in ("head_dim", "d_kv"):
        if isinstance(getattr(text, key, None), int):
            return getattr(text, key)
    hidden = getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None

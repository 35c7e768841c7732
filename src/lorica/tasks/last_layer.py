"""The last layer of a model, behind whose attention only those rows go on that somebody reads.

A loss reads the rows with a label, a classifier one row of a text. In the layers below every row is
a key and a value for others; behind the attention of the last layer a row is for itself. So the
rows that nobody reads need not go through the rest of that layer, most of its products: with half
of the rows labelled that is five percent of the products of eight layers, and of a classifier with
six layers an eighth.

No code of a model is copied. In front of the output projection of attention the rows are chosen,
and where the layer then adds all rows to the chosen ones, which is its residual connection, the
same are chosen there. Whether a model gives the same so is tried in `probe`.

Legend: T rows of the flat batch, K rows that go on, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lorica.tasks.layout import ROW_MULTIPLE, Block, Documents


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows that go on.

    Attributes:
        rows: where each of them lies in the flat row (K,).
        total: T, which is never K.
        ranges: (start, end) of each block among them; a block's rows are filled up to a multiple
            of `ROW_MULTIPLE`, as everywhere.
        chosen: for each block where its rows lie that somebody reads, among those that go on.
        texts: whether each of them is a text of its own to what comes behind the last layer: its
            hidden states are (K, 1, D) then, and else (1, K, D).
    """

    rows: Tensor
    total: int
    ranges: tuple[tuple[int, int], ...]
    chosen: tuple[Tensor, ...]
    texts: bool = False

    def of(self, hidden: Tensor) -> Tensor:
        """Those rows of (1, T, D): (1, K, D), or (K, 1, D)."""
        kept = _Choose.apply(hidden[0], self.rows)
        return kept.unsqueeze(1 if self.texts else 0)

    def to(self, device: torch.device) -> Kept:
        chosen = tuple(rows.to(device) for rows in self.chosen)
        return Kept(self.rows.to(device), self.total, self.ranges, chosen, self.texts)


def keep_rows(
    documents: Documents, wanted: Sequence[Tensor], *, texts: bool = False
) -> Kept | None:
    """Let rows of each block go on.

    What is decided for a block depends on that block alone, or training beside others would not
    equal training alone.

    Args:
        wanted: for each block the rows, counted from its first, that somebody reads.

    Returns:
        None where all rows of all blocks are to go on.
    """
    rows, ranges, chosen, start, before = [], [], [], 0, 0
    for block, own in zip(documents.blocks, wanted, strict=True):
        size = max(1, -(-len(own) // ROW_MULTIPLE)) * ROW_MULTIPLE
        if size < block.size or texts:
            fill = torch.full((size - len(own),), _idle(block, own))
            rows.append(torch.cat([own, fill]) + before)
            chosen.append(torch.arange(start, start + len(own)))
        else:
            size = block.size
            rows.append(torch.arange(before, before + size))
            chosen.append(own + start)
        ranges.append((start, start + size))
        start, before = start + size, before + block.size
    if start == before and not texts:
        return None
    return Kept(torch.cat(rows), before, tuple(ranges), tuple(chosen), texts)


def _idle(block: Block, wanted: Tensor) -> int:
    """A row of the block that nobody reads: one that fills it up, or a document's. There is one
    wherever fewer rows are wanted than the block has.
    """
    if block.used < block.size:
        return block.used
    unread = torch.ones(block.used, dtype=torch.bool)
    unread[wanted] = False
    return int(unread.nonzero()[0])


@dataclass(frozen=True)
class Place:
    """Where rows are chosen, as names: they hold for a shallower twin of the model too.

    Attributes:
        layers: path of the list of layers, of which the last is meant.
        projection: path, within that layer, of the output projection of its attention; None: rows
            are chosen behind the layer.
    """

    layers: str
    projection: str | None


class LastLayer:
    """The last layer of one model.

    Attributes:
        place: where rows are chosen.
        kept: which rows go on in the passes to come, and when they are computed again; None: all.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        self.place = place
        self.layers: Any = model.get_submodule(place.layers)
        self.layer: nn.Module = self.layers[-1]
        own = place.projection
        self.projection = None if own is None else self.layer.get_submodule(own)
        self.kept: Kept | None = None

    def adapted(self, model: nn.Module, *, now: bool) -> bool:
        """Whether an adapter lies on a layer as a whole, or on all of them: it knows rows by their
        number.

        Args:
            now: whether one that does not act in the pass at hand does not count.
        """
        path = self.place.layers.split(".")
        around = [model.get_submodule(".".join(path[:n])) for n in range(len(path))]
        plates = [m.__dict__.get("_lorica") for m in (*around, *self.layers)]
        return any(p is not None and (p.acting() or not now) for p in plates)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the layer know of `kept` inside the block, which ends behind the backward pass."""
        if "forward" in self.layer.__dict__:  # this block lies within another one
            yield
            return
        self.layer.__dict__["forward"] = self._forward
        try:
            yield
        finally:
            del self.layer.__dict__["forward"]
            self.kept = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer
        forward = type(layer).forward
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            # transformers checkpoints within `forward`, and what is computed again must be all
            inner = partial(self._passed, forward.__wrapped__, **kwargs)
            return layer._gradient_checkpointing_func(inner, *args)
        return self._passed(forward, *args, **kwargs)

    def _passed(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self.kept
        if kept is None:
            return forward(self.layer, *args, **kwargs)
        if self.projection is None:
            return _first(forward(self.layer, *args, **kwargs), kept.of)
        narrow = replace(kept, texts=False)
        choosing = self.projection.register_forward_pre_hook(
            lambda _, inputs: (narrow.of(inputs[0]), *inputs[1:])
        )
        try:
            with _Residual(narrow):
                said = forward(self.layer, *args, **kwargs)
        finally:
            choosing.remove()
        return _first(said, lambda hidden: hidden.transpose(0, 1) if kept.texts else hidden)


Seen = list[tuple[nn.Module, Tensor]]
"""Layers and what they were given, and attentions and what they gave, in the order of a pass."""


@contextmanager
def noting(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Add to `seen` what every module without children is given; `Documents.seen` adds the rest.
    All of it is kept, so that no memory is used twice.
    """

    def note(module: nn.Module, inputs: tuple) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            seen.append((module, inputs[0]))

    leaves = [m for m in model.modules() if not [*m.children()]]
    hooks = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def places(model: nn.Module, seen: Seen) -> list[Place]:
    """Where rows could be chosen, the best place first."""
    attentions = [i for i, (module, _) in enumerate(seen) if [*module.children()]]
    if len({seen[i][0] for i in attentions}) < max(1, len(attentions)):  # ALBERT runs one again
        return []
    module, made = seen[attentions[-1]]
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m))
    found = next(((n, m) for n, m in lists if module in set(m[-1].modules())), None)
    if found is None or "forward" in found[1][-1].__dict__:  # another tool's
        return []
    path, layers = found
    names = {m: n for n, m in layers[-1].named_modules()}
    storage = made.untyped_storage().data_ptr()
    after = seen[attentions[-1] + 1 :]
    same = (m for m, given in after if given.untyped_storage().data_ptr() == storage)
    projection = names.get(next(same, None))  # type: ignore[arg-type]
    behind = [Place(path, None)]
    return behind if projection is None else [Place(path, projection), *behind]


def _first(said: Any, change: Any) -> Any:
    """What a layer says, with its hidden states changed: bare, or the first of a tuple."""
    return (change(said[0]), *said[1:]) if isinstance(said, tuple) else change(said)


class _Residual(TorchFunctionMode):
    """Where all rows and the chosen ones are added, the same are chosen of all."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _SUMS and len(args) >= 2:
            a, b = args[:2]
            if self._all(a) and self._some(b):
                args = (self.kept.of(a), *args[1:])
            elif self._all(b) and self._some(a):
                args = (a, self.kept.of(b), *args[2:])
        return func(*args, **(kwargs or {}))

    def _all(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:-1] == (1, self.kept.total)

    def _some(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:-1] == (1, len(self.kept.rows))


_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


class _Choose(torch.autograd.Function):
    """(T, D) -> (K, D). Autograd's own way back adds row by row; here no row that has a gradient is
    chosen twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(hidden)
        return hidden.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        back = gradient.new_zeros(ctx.total, *gradient.shape[1:])
        return back.index_copy_(0, rows, gradient), None

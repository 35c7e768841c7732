"""Layers below the lowest adapted one, run once for all adapters that are given the same records.

Candidates of a search see the same data in the same order, so in most passes every adapter brings
the same block of records. Below the lowest layer that any of them touches the base computes the
same rows for each, and rows do not depend on what lies beside them: one block goes through these
layers, and its states are laid side by side for the adapters. The bits are those of the whole pass.
Nothing is kept from step to step; that is `reuse_frozen_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import ref

import torch
from torch import nn

from lorica.attach.activate import activate
from lorica.attach.handle import Adapter
from lorica.attach.middle import Middle, body_output, middle_of
from lorica.base.batch import beside
from lorica.data.encode import Example
from lorica.tasks.task import Batch, Task, answering, device_of
from lorica.train.beginnings import Beginnings, beginnings_of


class SharedLayers:
    """What lies below all adapters of a pass.

    Args:
        together: makes the batches of the run.

    Attributes:
        passes: how many passes shared it.
    """

    def __init__(self, model: nn.Module, task: Task, together: Beginnings | None = None) -> None:
        self.model, self.passes = model, 0
        self.together = together or beginnings_of(model, task, wanted=False)
        self._middles: dict[frozenset[ref[Adapter]], Middle | None] = {}
        self._fits: dict[int, Middle | None] = {}

    @contextmanager
    def shared(
        self, adapters: Sequence[Adapter], blocks: Sequence[Sequence[Example]], batch: Batch
    ) -> Iterator[None]:
        """Run the model from the middle on, where that saves blocks; else as always. The model runs
        as in a step.
        """
        pairs = list(zip(adapters, blocks, strict=True))
        keys = [(*map(id, block), bool(self.together.of(a, block))) for a, block in pairs]
        once = dict(zip(keys, pairs, strict=True))
        middle = self._middle(adapters) if len(once) < len(blocks) and batch.rows else None
        if middle is None:
            yield
            return
        own = self.together.collate([a for a, _ in once.values()], [b for _, b in once.values()])
        apart = beside(self.model, own.rows)
        with torch.no_grad(), activate(self.model, None), apart, middle.below() as caught:
            body_output(self.model, own.inputs)
        rows = dict(zip(once, own.rows or (), strict=True))
        states = torch.cat([caught[0][:, slice(*rows[key])] for key in keys], 1)
        self.passes += 1
        with middle.above(states):
            yield

    def _middle(self, adapters: Sequence[Adapter]) -> Middle | None:
        key = frozenset(map(ref, adapters))  # one that has left the run lives no longer for it
        if key not in self._middles:
            middle, _ = middle_of(self.model, [*adapters])
            self._middles[key] = None if middle is None else self._tried(middle)
        return self._middles[key]

    def _tried(self, middle: Middle) -> Middle | None:
        """The middle, if the model can be entered there."""
        if middle.index not in self._fits:
            with answering(self.model), activate(self.model, None):
                ids = torch.arange(1, 65, device=device_of(self.model)).view(2, 32)
                limit = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr]
                fault = middle.fault(self.model, {"input_ids": ids % limit})
            self._fits[middle.index] = None if fault else middle
        return self._fits[middle.index]

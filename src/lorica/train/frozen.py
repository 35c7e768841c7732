"""Layers below the lowest adapted one: run once for every record, not in every epoch.

Nothing below the lowest layer that an adapter touches ever changes, and autograd records nothing
there. So what comes out of these layers is a function of the record's tokens, and can be kept.

It must also be a function of the tokens to the last bit, or a record would train otherwise
depending on what is kept. Kernels round differently with the shapes that they are given, so the
layers below never see the batch: every record is filled up to a multiple of 32 tokens of its own,
and runs in a rectangle of records that are as long. Then the same bits come out whatever is in the
rectangle with it (a test holds it), and a run trains to the same bits whether its states came from
memory, from disk, or were computed in every step. They differ from those of a run without this in
the last places, since there these layers see the batch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.attach.activate import activate
from lorica.attach.handle import Adapter
from lorica.attach.middle import Middle, body_output, middle_of
from lorica.base.digest import digest_of
from lorica.data.encode import Example
from lorica.tasks.task import Batch, Task, answering, device_of, filler
from lorica.train.measure import versions
from lorica.train.passes import draws
from lorica.train.states import Key, States

MULTIPLE = 32
"""Tokens that a record is filled up to, so that matrix kernels treat no row as a remainder."""

MOST_TOKENS = 8192
"""Of a rectangle."""


class FrozenLayers:
    """The layers of a model below some adapters.

    Args:
        middle: where the layers end.
        states: where their outputs are kept.
    """

    def __init__(self, model: nn.Module, task: Task, middle: Middle, states: States) -> None:
        self.model, self.task, self.middle, self.states = model, task, middle, states
        self.computed = self.reused = 0
        """Records that went through the layers, and that did not have to."""

    @contextmanager
    def skipped(self, blocks: Sequence[Sequence[Example]], batch: Batch) -> Iterator[None]:
        """Run the model from the middle on, for a batch that `task.collate` made of `blocks`."""
        found = self._states_of([example for block in blocks for example in block])
        laid = _laid_out(found, blocks, batch)
        if batch.kept is not None and self.middle.index == len(self.middle.layers):
            laid = batch.kept.of(laid)  # the layer that would choose them does not run
        with self.middle.above(laid):
            yield

    def close(self) -> None:
        self.states.close()

    def _states_of(self, examples: Sequence[Example]) -> list[Tensor]:
        keys = [_key(example) for example in examples]
        found = {key: self.states.get(key) for key in keys}
        missing = {k: e for k, e in zip(keys, examples, strict=True) if found[k] is None}
        self.computed += len(missing)
        self.reused += len(examples) - len(missing)
        for rectangle in _rectangles(missing):
            for key, state in self._computed(rectangle).items():
                found[key] = state
                self.states.put(key, state)
        return [state for key in keys if (state := found[key]) is not None]

    def _computed(self, rectangle: dict[Key, Example]) -> dict[Key, Tensor]:
        examples = [*rectangle.values()]
        inputs = self._inputs(examples)
        with answering(self.model), activate(self.model, None), self.middle.below() as caught:
            body_output(self.model, inputs)
        hidden = caught[0]
        return {
            key: hidden[row, : len(example)].clone()
            for row, (key, example) in enumerate(rectangle.items())
        }

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What the model is given of records of about one length, padded on the right to one of
        `MULTIPLE`.
        """
        fill = filler(self.model, self.task.tokenizer)
        inputs = self.task.rectangle(examples, self.model)
        longest = inputs["input_ids"].shape[1]
        more = _filled(longest) - longest
        values = {"input_ids": fill}
        return {k: F.pad(t, (0, more), value=values.get(k, 0)) for k, t in inputs.items()}


def frozen_layers(model: nn.Module, adapters: Sequence[Adapter]) -> tuple[Middle | None, str]:
    """The middle below these adapters, which train together; or None, and why nothing can be
    reused.
    """
    if draws(model):
        return None, "the base uses dropout in training"
    middles = [middle_of(model, [adapter]) for adapter in adapters]
    for middle, reason in middles:
        if middle is None:
            return None, reason
    if len({middle.index for middle, _ in middles if middle}) > 1:
        return None, "the adapters do not begin at the same layer"
    middle = middles[0][0]
    assert middle is not None
    with answering(model), activate(model, None):
        ids = torch.arange(1, 2 * MULTIPLE + 1, device=device_of(model)).view(2, MULTIPLE)
        limit = model.config.get_text_config().vocab_size  # type: ignore[union-attr]
        fault = middle.fault(model, {"input_ids": ids % limit})
    return (middle, "") if fault is None else (None, fault)


def states_bytes(model: Any, examples: Sequence[Example]) -> int:
    """Bytes of the states of all records."""
    width = model.config.get_text_config().hidden_size
    return sum(map(len, examples)) * width * next(model.parameters()).element_size()


def states_file(folder: Path, model: Any, middle: Middle) -> Path:
    """Where states of these layers lie: a name that differs with all that they depend on beside
    the record.
    """
    parts = {
        "base": digest_of(model),
        "class": type(model).__name__,
        "config": model.config.to_json_string(use_diff=False),
        "layers": f"{middle.path}[:{middle.index}]",
        "dtype": str(next(model.parameters()).dtype),
        "attention": model.config._attn_implementation,
        "device": str(device_of(model)),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **versions(),
    }
    text = "\n".join(f"{key}: {value}" for key, value in parts.items())
    return folder / hashlib.sha256(text.encode()).hexdigest()


def _key(example: Example) -> Key:
    digest = hashlib.sha256()
    for numbers in (example.input_ids, getattr(example, "segments", ())):
        digest.update(array("q", [len(numbers), *numbers]))
    return digest.digest()


def _filled(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _rectangles(missing: dict[Key, Example]) -> Iterator[dict[Key, Example]]:
    """Records that are as long when they are filled up, so many as go through at once."""
    by_length: dict[int, list[Key]] = {}
    for key, example in missing.items():
        by_length.setdefault(_filled(len(example)), []).append(key)
    for length, keys in by_length.items():
        size = max(1, MOST_TOKENS // length)
        for start in range(0, len(keys), size):
            yield {key: missing[key] for key in keys[start : start + size]}


def _laid_out(found: Sequence[Tensor], blocks: Sequence[Sequence[Example]], batch: Batch) -> Tensor:
    """States in the layout of a batch; zeros where it is filled up."""
    ids = batch.inputs["input_ids"]
    laid = torch.zeros(*ids.shape, found[0].shape[-1], dtype=found[0].dtype)
    if batch.rows is None:
        for row, state in enumerate(found):
            laid[row, : len(state)] = state
        return laid.to(ids.device)
    left = iter(found)
    for (start, _), block in zip(batch.rows, blocks, strict=True):
        flat = torch.cat([next(left) for _ in block])
        laid[0, start : start + len(flat)] = flat
    return laid.to(ids.device)

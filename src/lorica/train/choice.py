"""What a choice from records is given, and what it answers with.

Some adapters are made from the task's records: which entries of the weights train, which layers
deserve how much rank, in which directions the factors begin. Each such choice is a function of a
`Question` in a file of its own; `train.starts` is the door to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorica.attach.places import Places
from lorica.attach.survey import layer_number, suffix_of
from lorica.data.encode import Example
from lorica.methods.method import Layer, Method, Tensors
from lorica.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Question:
    """What a choice is made from.

    Attributes:
        model: the base, with nothing of the adapter on it.
        places: where the method may go; copies and rows of tokens left out.
        layers: their descriptions, by path.
        method: the settings of the whole adapter.
        task: what the loss is.
        examples: encoded records, drawn for this; empty where the choice needs none.
        seed: of what is drawn.
        between: to be called before every record; may raise to leave.
    """

    model: nn.Module
    places: Places
    layers: dict[str, Layer]
    method: Any
    task: Task
    examples: Sequence[Example]
    seed: int
    between: Callable[[], None]


@dataclass(frozen=True)
class Relevance:
    """How much each place matters, and what it was given.

    Attributes:
        measure: what was measured, in a word, such as "fisher".
        unit: what was given out: "entries" of weights, or "ranks".
        values: path of a place -> how much it matters, by the measure.
        chosen: path of a place -> how many units it was given.
        sizes: path of a place -> how many it could have had.
        heads: path of a layer of attention -> the values of its heads, where they were measured.
        num_records: how many records decided.
        notes: what else should be told.
        groups: path of a place -> scores of its neurons or heads (n,), where these were chosen.
    """

    measure: str
    unit: str
    values: dict[str, float]
    chosen: dict[str, int]
    sizes: dict[str, int]
    heads: dict[str, tuple[float, ...]] = field(default_factory=dict)
    num_records: int = 0
    notes: tuple[str, ...] = ()
    groups: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        total = sum(self.chosen.values()) or 1
        of = f"{total:,} of {sum(self.sizes.values()):,} {self.unit}"
        if len(set(self.chosen.values())) == 1 and len(self.chosen) > 1:  # only measured
            best = sorted(self.values, key=lambda path: -self.values[path])[:3]
            shown = ", ".join(f"{path} {self.values[path]:.3g}" for path in best)
            text = f"{of}, as many everywhere; largest {self.measure}: {shown}"
        else:
            best = sorted(self.chosen, key=lambda path: -self.chosen[path])[:3]
            shown = ", ".join(f"{path} {self.chosen[path] / total:.0%}" for path in best)
            text = f"{of} by {self.measure}: {shown}"
        return "; ".join([text, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, with the layer and the kind of module of every place."""
        places = [
            {
                "path": path,
                "layer": layer_number(path),
                "kind": suffix_of(path.removesuffix(".weight")),
                "value": value,
                "chosen": self.chosen.get(path, 0),
                "size": self.sizes[path],
                **({"heads": list(self.heads[path])} if path in self.heads else {}),
            }
            for path, value in self.values.items()
        ]
        return {
            "measure": self.measure,
            "unit": self.unit,
            "num_records": self.num_records,
            "notes": list(self.notes),
            "places": places,
        }


@dataclass(frozen=True, eq=False)
class Answer:
    """What was chosen.

    Attributes:
        method: the settings of the whole adapter.
        own: path -> the settings there; places that are missing are left out.
        tensors: path -> what the adapter holds there.
        relevance: why.
    """

    method: Method
    own: dict[str, Any]
    tensors: dict[str, Tensors]
    relevance: Relevance

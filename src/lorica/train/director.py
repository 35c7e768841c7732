"""Who decides, while adapters train together, which of them goes on and which joins.

A run trains what it was given to the end. A director changes that: it hears of every evaluation and
may end the adapter there; and between the steps it may send new ones in, each with its own data and
settings. Whoever joins trains to the same bits as if it had the base for itself.

What a director knows goes into every checkpoint as plain values, together with what it has decided
about, so that a run that is gone on with never asks the same question twice, nor one too few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorica.attach.handle import Adapter
from lorica.config import TrainSettings
from lorica.data.encode import Example

Records = Sequence[dict] | Sequence[Example]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of one adapter found.

    Attributes:
        name: of the adapter.
        step, total: optimizer steps that it has made, and that it was given.
        scores: "eval_loss", and those of the evaluator.
        best: whether no evaluation of this adapter was better.
        losses: summed negative log-likelihood (nats) of every evaluation example, in their order.
        tokens: trained tokens of every one, which `losses` sums over.
        rows: the record that each example was made of, as an index into the evaluation records.
        beside: the evaluations of other adapters in the same turn, so that adapters can be compared
            whichever is asked about first.
    """

    name: str
    step: int
    total: int
    scores: Mapping[str, float]
    best: bool
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    beside: tuple[Evaluation, ...] = ()


@dataclass(frozen=True)
class Newcomer:
    """An adapter that joins, attached to the base of the run.

    Attributes:
        adapter: its handle, under a name that no other adapter of the run has had.
        data: its records, or examples that the task has encoded.
        settings: its settings; those of the run as a whole (`agreement.OF_THE_RUN`) are the run's.
        eval_data: its held-out records.
    """

    adapter: Adapter
    data: Records
    settings: TrainSettings
    eval_data: Records = ()


class Later:
    """The answer of a director that cannot judge yet: see `LATER`."""


LATER = Later()
"""Not yet: the adapter rests, and the director is asked about the same evaluation before every
turn until it answers.
"""


class Director(Protocol):
    """Decides who trains. Whatever it raises ends the run, which can be gone on with."""

    def judge(self, evaluation: Evaluation) -> str | Later | None:
        """Asked after every evaluation: why this adapter ends now, or None for going on; LATER
        where that hangs on what is not known yet.

        Of an adapter that has reached its last step, or has ended itself by its patience, it hears
        too; the answer then changes nothing.
        """
        ...

    def newcomers(self, standing: Mapping[str, str | None]) -> Sequence[Newcomer]:
        """Asked before every turn of the run (a step of each adapter that trains): who joins now.

        Args:
            standing: every adapter of the run so far -> why it ended, or None where it still
                trains.

        Returns:
            adapters that are attached. The run ends when nobody trains and nobody joins.
        """
        ...

    def again(self, name: str) -> Newcomer:
        """Asked where a run goes on from a checkpoint: the same newcomer once more, attached anew.
        Its tensors are then those of the checkpoint.
        """
        ...

    @property
    def state(self) -> dict[str, Any]:
        """What it must know to go on, as values that JSON has; put into every checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` was."""
        ...

"""Train some of the base's own parameters, and keep the difference apart from the base.

    all     full fine-tuning of the chosen layers (Howard and Ruder 2018, arXiv 1801.06146, for
            training the last layers alone)
    bias    BitFit: the biases alone (Ben Zaken et al. 2021, arXiv 2106.10199)
    norm    the weights and biases of normalisation layers alone (Zhao et al. 2023, arXiv
            2312.11420)
    head    the classifier or the output layer alone (linear probing: Alain and Bengio 2016, arXiv
            1610.01644)

What trains is a copy, so the adapter can be switched, mixed, merged and saved like any other. The
copies of the last layers may begin anew rather than from the base (Zhang et al. 2021, "Revisiting
Few-sample BERT Fine-tuning", arXiv 2006.05987): then the adapter is no identity at its start, and
the base still stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from lorica.methods.method import setting
from lorica.methods.placed import Placed

KINDS = ("all", "bias", "norm", "head")


@dataclass(frozen=True)
class Selective(Placed):
    """Which of the base's own parameters train. It is placed by `attach.params`.

    `target_modules` names layers or whatever holds them; "auto" is the whole model.
    """

    parameters: Literal["all", "bias", "norm", "head"] = setting(
        "all", "which parameters of the chosen layers train: all, bias, norm, or head"
    )
    last_layers: int | None = setting(None, "only so many of the last layers, and what follows")
    reinit_top_layers: int | tuple[int, ...] = setting(
        0,
        "begin so many of the last layers anew, and the pooler; a list such as 0,1,2: as many of "
        "them as give the lowest eval loss in a trial of each",
    )

    kind: ClassVar[str] = "selective"
    title: ClassVar[str] = "some of the base's own parameters (all: arXiv 1801.06146)"

    @property
    def outside(self) -> bool:
        """Whether parameters outside of the numbered layers may be among them."""
        return True

    @property
    def ties(self) -> bool:
        """Whether a weight that several layers share trains, as one; else it stays frozen."""
        return False

    @property
    def candidates(self) -> tuple[int, ...]:
        """The numbers of `reinit_top_layers` among which a trial must choose; empty where one
        number is given.
        """
        given = self.reinit_top_layers
        return given if isinstance(given, tuple) else ()

    def stand_in(self) -> Self:
        """Settings of the same size whose start is that of the base."""
        return replace(self, reinit_top_layers=0)

    def _canonical(self) -> dict[str, Any]:
        found = super()._canonical()
        given: Any = self.reinit_top_layers
        if isinstance(given, list | set | range):
            found["reinit_top_layers"] = tuple(sorted(given) if isinstance(given, set) else given)
        return found

    def _problems(self) -> list[str]:
        found = []
        if self.parameters not in KINDS:
            found.append(f"parameters is {self.parameters!r}; there are {', '.join(KINDS)}")
        k: Any = self.last_layers
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            found.append(f"last_layers is {k!r}; it must be a whole number from 1")
        if k is not None and self.layers_to_transform is not None:
            found.append("last_layers has no effect beside layers_to_transform; keep one")
        return found + self._reinit_problems()

    def _reinit_problems(self) -> list[str]:
        given: Any = self.reinit_top_layers
        numbers = list(given) if isinstance(given, tuple) else [given]
        if not numbers or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers
        ):
            return [f"reinit_top_layers is {given!r}; it must be a whole number from 0, or several"]
        found = []
        if len(set(numbers)) < len(numbers) or (isinstance(given, tuple) and len(numbers) < 2):
            found.append(f"reinit_top_layers is {list(given)}; a trial needs different numbers")
        if any(numbers) and self.parameters != "all":
            found.append(
                f"reinit_top_layers={given} goes with parameters=all: what begins anew must train "
                "whole"
            )
        if self.last_layers is not None and max(numbers) > self.last_layers:
            found.append(
                f"reinit_top_layers={given} is more than last_layers={self.last_layers}, and only "
                "what trains can begin anew"
            )
        return found

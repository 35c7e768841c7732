"""Train some of the base's own parameters, and keep the difference apart from the base.

    all     full fine-tuning of the chosen layers (Howard and Ruder 2018, arXiv 1801.06146, for
            training the last layers alone)
    bias    BitFit: the biases alone (Ben Zaken et al. 2021, arXiv 2106.10199)
    norm    the weights and biases of normalisation layers alone (Zhao et al. 2023, arXiv
            2312.11420)

What trains is a copy, so the adapter can be switched, mixed, merged and saved like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorica.methods.method import setting
from lorica.methods.placed import Placed


@dataclass(frozen=True)
class Selective(Placed):
    """Which of the base's own parameters train. It is placed by `attach.params`.

    `target_modules` names layers or whatever holds them; "auto" is the whole model.
    """

    parameters: Literal["all", "bias", "norm"] = setting(
        "all", "which parameters of the chosen layers train: all, bias, or norm"
    )
    last_layers: int | None = setting(None, "only so many of the last layers, and what follows")

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

    def _problems(self) -> list[str]:
        found = []
        if self.parameters not in ("all", "bias", "norm"):
            found.append(f"parameters is {self.parameters!r}; there are all, bias, norm")
        k: Any = self.last_layers
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            found.append(f"last_layers is {k!r}; it must be a whole number from 1")
        if k is not None and self.layers_to_transform is not None:
            found.append("last_layers has no effect beside layers_to_transform; keep one")
        return found

"""How far the answers move when an adapter is merged into a quantized base and quantized again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.base.quantize import quantized_layers
from lorica.errors import BaseModelError, LoricaWarning
from lorica.mix import merge

TOKENS = 64
"""Random tokens that both are asked, in each of two rows."""


@dataclass(frozen=True)
class Moved:
    """What merging and quantizing again does to the logits.

    Attributes:
        change: root mean square of the change, over that which the adapter makes.
        agree: share of positions with the same most likely word.
        weights: path -> root mean square of the weight's error over that of its update.
    """

    change: float
    agree: float
    weights: Mapping[str, float]

    def __str__(self) -> str:
        worst = sorted(self.weights.items(), key=lambda item: -item[1])[:5]
        lines = [
            f"quantized again, the logits are off by {self.change:.0%} of what the adapter "
            f"changes; {self.agree:.1%} of the most likely words stay",
            *(f"  {path}: error {error:.0%} of the update" for path, error in worst),
        ]
        return "\n".join(lines)


@torch.no_grad()
def how_far(model: nn.Module, mixture: Mapping[str, float], *, seed: int = 0) -> Moved:
    """Try a merge with `requantize` on a copy; the model stays as it is.

    Args:
        model: a quantized model of transformers, with the adapters.

    Raises:
        BaseModelError: no layer of the model is quantized by Lorica.
    """
    if not any(True for _ in quantized_layers(model)):
        raise BaseModelError(
            "no layer of this base is quantized, so none can be quantized again",
            mend="leave --requantize out",
        )
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    words = config.get_text_config().vocab_size
    device = next(model.parameters()).device
    ids = torch.randint(words, (2, TOKENS), generator=generator).to(device)
    with activate(model, None):
        base = _logits(model, ids)
    with activate(model, dict(mixture)):
        wanted = _logits(model, ids)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoricaWarning)  # the damage is what is asked for
        report = merge(twin, mixture, force=True, requantize=True)
    found = _logits(twin, ids)
    moved = (wanted - base).norm()
    return Moved(
        float((found - wanted).norm() / moved) if moved else 0.0,
        float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        {weight.path: weight.damage for weight in report.merged},
    )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    how = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}  # type: ignore[union-attr]
    return model(input_ids=ids, **how).logits.float()

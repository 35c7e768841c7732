"""P-tuning: virtual tokens that a small network makes out of trained embeddings.

    prompt = MLP(LSTM(e))   or   prompt = MLP(e)        e (P, H)

Liu et al. 2021, "GPT Understands, Too" (arXiv 2103.10385), section 3.3: a bidirectional LSTM and a
two-layer perceptron tie the virtual tokens to each other while they train. Afterwards only what it
makes is needed, and only that is written to files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.virtual import VirtualTokens, count_problems, linear_start

_ENCODERS = ("MLP", "LSTM")


@dataclass(frozen=True)
class PTuning(VirtualTokens):
    """Settings and arithmetic of P-tuning."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = setting(
        "MLP", "what makes the virtual tokens: three linear layers, or an LSTM and two"
    )
    encoder_hidden_size: int = setting(0, "width inside of it; 0: that of the model")
    encoder_num_layers: int = setting(2, "layers of the LSTM")

    kind: ClassVar[str] = "p-tuning"
    title: ClassVar[str] = "virtual tokens out of a small network (arXiv 2103.10385)"
    folded: ClassVar[str] = "prompt"

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        width = layer.out_features
        hidden = self.encoder_hidden_size or width
        found = {"embedding": torch.randn(self.num_virtual_tokens, width, generator=generator)}
        if self.encoder_reparameterization_type == "MLP":
            sizes = [(hidden, width), (hidden, hidden), (width, hidden)]
        else:
            found |= self._lstm_start(width, hidden, generator)
            sizes = [(2 * hidden, 2 * hidden), (width, 2 * hidden)]
        for number, (out, into) in enumerate(sizes):
            found |= linear_start(out, into, generator, f"mlp.{number}")
        return found

    def embeddings(self, tensors: Tensors) -> Tensor:
        """The virtual tokens (P, H)."""
        if self.folded in tensors:  # read from a file
            return tensors[self.folded]
        x = tensors["embedding"]
        if self.encoder_reparameterization_type == "LSTM":
            x = self._lstm(x, tensors)
        numbers = sorted({name.split(".")[1] for name in tensors if name.startswith("mlp.")})
        for number in numbers:
            x = F.linear(x, tensors[f"mlp.{number}.weight"], tensors[f"mlp.{number}.bias"])
            x = x if number == numbers[-1] else F.relu(x)
        return x

    def fold(self, tensors: Tensors) -> Tensor:
        """What acts, as one matrix (P, H)."""
        return self.embeddings(tensors)

    def _lstm_start(self, width: int, hidden: int, generator: torch.Generator) -> Tensors:
        bound, found = hidden**-0.5, {}
        for name in self._lstm_names():
            into = hidden if "hh" in name else width if "_l0" in name else 2 * hidden
            shape = (4 * hidden, into) if name.startswith("weight") else (4 * hidden,)
            found[f"lstm.{name}"] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return found

    def _lstm_names(self) -> list[str]:
        """Its tensors in the order that torch takes them."""
        return [
            f"{kind}_{of}_l{number}{direction}"
            for number in range(self.encoder_num_layers)
            for direction in ("", "_reverse")
            for kind in ("weight", "bias")
            for of in ("ih", "hh")
        ]

    def _lstm(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Both directions over the virtual tokens: (P, H) -> (P, 2 hidden)."""
        own = [tensors[f"lstm.{name}"] for name in self._lstm_names()]
        hidden = own[1].shape[1]
        zeros = x.new_zeros(2 * self.encoder_num_layers, 1, hidden)
        layers = self.encoder_num_layers
        y, _, _ = torch.lstm(x[:, None], (zeros, zeros), own, True, layers, 0.0, False, True, False)
        return y[:, 0]

    def _problems(self) -> list[str]:
        found = super()._problems()
        if self.encoder_reparameterization_type not in _ENCODERS:
            found.append(
                f"encoder_reparameterization_type is {self.encoder_reparameterization_type!r}; "
                f"there are {', '.join(_ENCODERS)}"
            )
        found += count_problems("encoder_hidden_size", self.encoder_hidden_size, 65536, least=0)
        found += count_problems("encoder_num_layers", self.encoder_num_layers, 64)
        if self.encoder_num_layers != 2 and self.encoder_reparameterization_type == "MLP":
            found.append("encoder_num_layers has no effect without an LSTM: the MLP has three")
        return found

"""AdamW whose two moments take 8 bits for each number (Dettmers et al. 2022, arXiv 2110.02861).

The step is computed in float32: the moments are read out, moved, used, and only then rounded again.
Small tensors keep moments in float32, where rounding would save nothing worth having.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorica.ops.blockwise import BLOCK, dequantize_blockwise, dynamic_map, quantize_blockwise

SMALLEST = 4096
"""Numbers of a tensor from which on its moments are rounded, as in bitsandbytes."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_bytes(parameter: Tensor) -> list[int]:
    """Bytes of the tensors that are kept for a parameter."""
    numel = parameter.numel()
    if numel < SMALLEST:
        return [4 * numel] * 2
    return [numel, 4 * math.ceil(numel / BLOCK)] * 2


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with rounded moments.

    What it keeps of a large tensor: "exp_avg" and "exp_avg_sq" as uint8, and a float32 scale for
    every 256 numbers of them; of a small one the same two in float32, without scales.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._codes = {"exp_avg": dynamic_map(signed=True), "exp_avg_sq": dynamic_map(signed=False)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for key in _MOMENTS:
                self._write(state, key, torch.zeros(parameter.shape, device=parameter.device))
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        mean, square = (self._read(state, key) for key in _MOMENTS)
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_((mean / spread).mul_(group["lr"] / (1 - beta1**step)))
        self._write(state, "exp_avg", mean)
        self._write(state, "exp_avg_sq", square)

    def _read(self, state: dict[str, Tensor], key: str) -> Tensor:
        if f"{key}_scale" not in state:
            return state[key]
        return dequantize_blockwise(state[key], state[f"{key}_scale"], self._code(state, key))

    def _write(self, state: dict[str, Tensor], key: str, moment: Tensor) -> None:
        state[key] = moment
        if moment.numel() >= SMALLEST:
            code = self._code(state, key)
            state[key], state[f"{key}_scale"] = quantize_blockwise(moment, code)

    def _code(self, state: dict[str, Tensor], key: str) -> Tensor:
        """The code of a moment, where its tensor lies."""
        if self._codes[key].device != state[key].device:
            self._codes[key] = self._codes[key].to(state[key].device)
        return self._codes[key]

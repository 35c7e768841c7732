"""AdamW whose two moments take 8 bits for each number (Dettmers et al. 2022, arXiv 2110.02861).

The step is computed in float32: the moments are read out, moved, used, and only then rounded again.
Small tensors keep moments in float32, where rounding would save nothing worth having. An adapter
has hundreds of tensors, so many of them go through the step as one: their blocks lie one after the
other, and no block has numbers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.ops.blockwise import BLOCK, blocks_of, dequantize, dynamic_code, quantize

SMALLEST = 4096
"""Numbers of a tensor from which on its moments are rounded, as in bitsandbytes."""

AT_ONCE = 2**18
"""Numbers that go through the step as one: what is computed of them stays in a cache."""


def moment_bytes(parameter: Tensor) -> list[int]:
    """Bytes of the tensors that are kept for a parameter."""
    if parameter.numel() < SMALLEST:
        return [4 * parameter.numel()] * 2
    num_blocks = math.ceil(parameter.numel() / BLOCK)
    return [BLOCK * num_blocks, 4 * num_blocks] * 2


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with rounded moments.

    What it keeps of a large tensor: "exp_avg" and "exp_avg_sq" as uint8 (blocks, 256), the last
    block filled up, and a float32 scale for each block; of a small one the same two in float32,
    without scales.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        how = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, how)
        self._codes = {
            "exp_avg": dynamic_code(signed=True),
            "exp_avg_sq": dynamic_code(signed=False),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for parameter in moving:
                self._begin(parameter)
                self.state[parameter]["step"] += 1
            for parameter in moving:
                if parameter.numel() < SMALLEST:
                    self._move(parameter, group)
            for together in self._packs([p for p in moving if p.numel() >= SMALLEST]):
                self._move_large(together, group)

    def _begin(self, parameter: nn.Parameter) -> None:
        state, device = self.state[parameter], parameter.device
        if state:
            return
        state["step"] = torch.zeros(())
        num_blocks = math.ceil(parameter.numel() / BLOCK)
        for key, code in self._codes.items():
            if parameter.numel() < SMALLEST:
                state[key] = torch.zeros(parameter.shape, device=device)
            else:
                zeros = torch.zeros(num_blocks, BLOCK, device=device)
                state[key], state[f"{key}_scale"] = quantize(zeros, code.to(device))

    def _packs(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Those of the same age on the same device that go through a step as one."""
        pack: list[nn.Parameter] = []
        size, kind = 0, None
        for parameter in parameters:
            own = self._age(parameter), parameter.device
            if pack and (own != kind or size + parameter.numel() > AT_ONCE):
                yield pack
                pack, size = [], 0
            pack.append(parameter)
            size, kind = size + parameter.numel(), own
        if pack:
            yield pack

    def _age(self, parameter: nn.Parameter) -> int:
        return int(self.state[parameter]["step"].item())

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient: Tensor = parameter.grad.float()  # type: ignore[union-attr]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(_change(gradient, mean, square, self._age(parameter), group))

    def _move_large(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        gradient = torch.cat([blocks_of(p.grad) for p in parameters])  # type: ignore[arg-type]
        codes = {key: code.to(gradient.device) for key, code in self._codes.items()}
        moments = [
            dequantize(
                torch.cat([s[key] for s in states]),
                torch.cat([s[f"{key}_scale"] for s in states]),
                code,
            )
            for key, code in codes.items()
        ]
        mean, square = moments
        change = _change(gradient, mean, square, self._age(parameters[0]), group)
        sizes = [len(s["exp_avg"]) for s in states]
        for parameter, part in zip(parameters, change.split(sizes), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(part.view(-1)[: parameter.numel()].view(parameter.shape))
        for (key, code), moment in zip(codes.items(), moments, strict=True):
            for name, whole in zip((key, f"{key}_scale"), quantize(moment, code), strict=True):
                for state, part in zip(states, whole.split(sizes), strict=True):
                    state[name].copy_(part)


def _change(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]
) -> Tensor:
    """What AdamW takes off, decay apart. The moments are moved in place."""
    beta1, beta2 = group["betas"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    return (mean / spread).mul_(group["lr"] / (1 - beta1**step))

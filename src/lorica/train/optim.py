"""Learning-rate schedules, and the optimizer of one adapter with its state by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config import TrainSettings
from lorica.errors import ConfigError
from lorica.train.adamw_8bit import SMALLEST, AdamW8bit, moment_bytes


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """The rate of optimizer step `step` (0 is the first) of `total`: a function of the step alone.

    A warm-up rises linearly to the peak, reached at its last step. Then: constant; linear to 0;
    half a cosine to 0; or wsd, the peak kept and a linear fall to 0 over the last `decay_ratio` of
    all steps.
    """
    peak, warmup = settings.learning_rate, num_warmup_steps(total, settings)
    if step < warmup:
        return peak * (step + 1) / warmup
    kind = settings.lr_scheduler_type
    if kind == "constant":
        return peak
    if kind == "wsd":
        decay = max(1, round(settings.decay_ratio * total))
        return peak * min(1.0, (total - step) / decay)
    left = (total - step) / max(1, total - warmup)
    return peak * left if kind == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))


def num_warmup_steps(total: int, settings: TrainSettings) -> int:
    """Steps of the warm-up in a run of `total`: `warmup_steps`, or else `warmup_ratio` of all."""
    if settings.warmup_steps is not None:
        return min(settings.warmup_steps, total)
    return min(total, round(settings.warmup_ratio * total))


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over one adapter's tensors, with moments
    in 32 or in 8 bits (`optim`).

    One tensor per parameter and one optimizer per adapter: then an adapter trains to the same bits
    beside others as alone. With LoRA+ (Hayou et al. 2024, arXiv 2402.12354) the factors B are a
    group of their own, whose "factor" multiplies the learning rate.

    Args:
        named: as `Adapter.named_parameters` gives them.

    Raises:
        ConfigError: loraplus_lr_ratio is set, and the adapter has no factor B; or moments are to
            take 8 bits, and all tensors are too small for that.
    """
    named = list(named)
    check_optim(named, settings)
    slow, fast = [], []
    for name, parameter in named:
        is_B = settings.loraplus_lr_ratio != 1 and name.endswith(".B")
        (fast if is_B else slow).append(parameter)
    if settings.loraplus_lr_ratio != 1 and not fast:
        raise ConfigError(
            f"loraplus_lr_ratio={settings.loraplus_lr_ratio} has no effect: this method has no B",
            mend="take it out, or use a method with LoRA's factors",
        )
    groups = [{"params": slow, "factor": 1.0}] if slow else []
    groups += [{"params": fast, "factor": settings.loraplus_lr_ratio}] if fast else []
    how: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optim == "adamw_8bit":
        return AdamW8bit(groups, **how)
    return torch.optim.AdamW(groups, fused=True, **how)


def check_optim(named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings) -> None:
    """Raises ConfigError where moments are to take 8 bits, and all tensors are too small."""
    largest = max((p.numel() for _, p in named), default=0)
    if settings.optim == "adamw_8bit" and largest < SMALLEST:
        raise ConfigError(
            f"optim=adamw_8bit has no effect: the largest tensor of this adapter has {largest:,} "
            f"numbers, and below {SMALLEST:,} moments keep 32 bits",
            mend="set optim: adamw",
        )


def moment_sizes(parameter: nn.Parameter, settings: TrainSettings) -> list[int]:
    """Bytes of the tensors that the optimizer keeps for a parameter."""
    if settings.optim == "adamw_8bit":
        return moment_bytes(parameter)
    return [parameter.numel() * parameter.element_size()] * 2


def moments(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's tensors, by name of the parameter and of the moment."""
    return {
        f"{name}|{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_moments(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `moments` gave."""
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        parameter = named[name]
        optimizer.state[parameter][key] = value.to(parameter.device)

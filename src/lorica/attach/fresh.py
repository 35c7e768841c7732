"""Parameters of a module as they were before anybody trained it, without touching the module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lorica.base.storage import weight_shape
from lorica.errors import TargetError
from lorica.methods.method import Tensors


def fresh_parameters(
    model: nn.Module, path: str, module: nn.Module, generator: torch.Generator
) -> Tensors:
    """New values of the module's own parameters, in float32 on the CPU.

    They are drawn as the model's class of transformers draws them, else as the module's
    `reset_parameters` does; a function of the generator alone.

    Raises:
        TargetError: neither knows how some of the parameters begin.
    """
    base: Any = getattr(type(module), "_lorica_base", type(module))
    stand_in = object.__new__(base)  # a class of FSDP would run its __init__
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    blank = {name: nn.Parameter(torch.full(weight_shape(module, name), math.nan)) for name in own}
    parameters = {name: blank.get(name) for name in module._parameters}
    stand_in.__dict__.update(module.__dict__, _parameters=parameters)
    draw: Any = getattr(model, "_init_weights", None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        if draw is not None:
            draw(stand_in)
        elif hasattr(stand_in, "reset_parameters"):
            stand_in.reset_parameters()
    unknown = [name for name, p in blank.items() if p.isnan().any()]
    if unknown:
        raise TargetError(
            f"nobody knows how {path} begins anew: {', '.join(unknown)}",
            expected="a model of transformers, or modules with reset_parameters()",
            mend="set reinit_top_layers: 0",
        )
    return {name: p.detach() for name, p in blank.items()}

"""Which layers are called and which only have their weights read; and who was passed by.

A layer whose weight is read by other code never runs its own forward, so an adapter that adds to
its output is silently without effect. `weight_read` knows the places in torch and transformers
where that happens; `unvisited` names, after a forward pass, the sites that it missed.
"""

from __future__ import annotations

import re

from torch import nn

from lorica.attach.plates import plates_of

_NUMBER = re.compile(r"\d+")


def weight_read(parent: nn.Module | None, name: str) -> bool:
    """Whether `parent` reads the weight of its child `name` instead of calling the child.

    Known places: the output projection of `nn.MultiheadAttention`; the two linear layers of
    `nn.TransformerEncoderLayer`, which its fast path in evaluation reads; the step projection and
    the convolution of Mamba mixers, which fused kernels read.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return name == "out_proj"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return name in ("linear1", "linear2")
    return "Mamba" in type(parent).__name__ and name in ("dt_proj", "conv1d")


def unvisited(model: nn.Module) -> list[str]:
    """After a forward pass in eager mode under `activate`: the acting places that it passed by.

    Experts are judged together, since the tokens decide which of them is called.
    """
    acting = [p for m in model.modules() for p in plates_of(m) if p.acting()]
    called = {_NUMBER.sub("*", p.path) for p in acting if p.last is p.route}
    return [
        p.path
        for p in acting
        if p.last is not p.route and not ("expert" in p.path and _NUMBER.sub("*", p.path) in called)
    ]

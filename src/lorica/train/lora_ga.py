"""LoRA-GA: the start of both factors from the gradient of the full weight.

    G = U diag(S) V^T;   A0 = c V[:, :r]^T,   B0 = c U[:, r:2r],   c = out^(1/4) / sqrt(gamma)

Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (arXiv 2407.05000),
algorithm 1: then the first step of the adapter comes as near as its rank allows to that of full
fine-tuning. There B0 A0 is taken off the base; here it is a frozen term of the adapter, and the
base stays as it is. PEFT 0.21 takes the same directions, but scales A0 by 1 and B0 by c diag(S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.methods.method import Tensors
from lorica.train.choice import Answer, Question, Relevance
from lorica.train.gradients import each_gradient, refuse_broken


def choose(question: Question) -> Answer:
    """Factors for every place, from the gradient summed over the records.

    Raises:
        ConfigError: no record reaches some of the layers.
        NonFiniteError: a gradient is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}

    def add(path: str, gradient: Tensor) -> None:
        sums[path] = sums[path].add_(gradient) if path in sums else gradient.clone()

    each_gradient(question, add)
    refuse_broken(sums)
    idle = [path for path in question.places if path not in sums or not sums[path].any()]
    if idle:
        raise ConfigError(
            f"the loss has no gradient at {len(idle)} layers, so lora_ga has no start for them",
            problems=idle[:10],
            mend="leave them out with exclude_modules, or raise init_records",
        )
    own = {path: method for path, (_, _, method) in question.places.items()}
    tensors = {path: _start(sums[path], question, path) for path in own}
    relevance = Relevance(
        measure="norm of the gradient",
        unit="ranks",
        values={path: sums[path].norm().item() for path in own},
        chosen={path: method.r for path, method in own.items()},  # type: ignore[attr-defined]
        sizes={path: min(sums[path].shape[-2:]) for path in own},
    )
    return Answer(question.method, own, tensors, relevance)


def _start(gradient: Tensor, question: Question, path: str) -> Tensors:
    """A0 and B0 in the shapes of the method there, and the factors that begin at them."""
    method, layer = question.places[path][2], question.layers[path]
    A, B = directions(gradient, method.r, method.lora_ga_gamma)  # type: ignore[attr-defined]
    shapes = method.start(layer, torch.Generator().manual_seed(0))
    A, B = A.cpu().reshape(shapes["A"].shape), B.cpu().reshape(shapes["B"].shape)
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


def directions(gradient: Tensor, r: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Gradient (..., O, I) -> A (..., r, I), B (..., O, r)."""
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    c = gradient.shape[-2] ** 0.25 / math.sqrt(gamma)
    return (c * Vh[..., :r, :]).contiguous(), (c * U[..., r : 2 * r]).contiguous()

"""Gradients of the loss by the base's own weights, record by record, without touching the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.attach.layers import to_stored
from lorica.errors import NonFiniteError
from lorica.methods.update import as_matrix
from lorica.train.choice import Question


def each_gradient(question: Question, take: Callable[[dict[str, Tensor]], None]) -> None:
    """Call `take` once per record with path -> gradient of its summed loss, as the matrix of
    `update.matrix_shape` in float32. Places that a record did not reach are missing.

    The base's weights want gradients for the time of it, and are left as they were; the base
    answers as in evaluation.
    """
    model, task, places = question.model, question.task, question.places
    weights: dict[str, nn.Parameter] = {}
    for path, (module, parameter, _) in places.items():
        weight: Any = module._parameters[parameter or "weight"]
        weights[path] = weight
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    training = model.training
    try:
        model.eval().requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for example in question.examples:
            question.between()
            with task.running(model), activate(model, None):
                loss = task.losses(model, task.collate([[example]], model))[0]
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            take(
                {
                    path: _matrix(gradient, question, path)
                    for path, gradient in zip(weights, gradients, strict=True)
                    if gradient is not None
                }
            )
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])
        model.train(training)


def _matrix(gradient: Tensor, question: Question, path: str) -> Tensor:
    module, parameter, _ = question.places[path]
    laid_out = to_stored(module, parameter or "weight", gradient)  # its own inverse
    return as_matrix(laid_out, question.layers[path]).float()


def refuse_broken(scores: dict[str, Tensor]) -> None:
    """Raises NonFiniteError for scores that are NaN or infinite."""
    broken = [path for path, score in scores.items() if not score.isfinite().all()]
    if broken:
        raise NonFiniteError(
            f"the gradients of {len(broken)} layers are not finite",
            problems=broken[:10],
            mend="use dtype: float32, or take out the records that cause them",
        )

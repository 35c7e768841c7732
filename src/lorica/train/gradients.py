"""Gradients of the loss by the base's own weights, record by record, without touching the base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.attach.layers import to_stored
from lorica.base.storage import is_packed
from lorica.errors import ConfigError, NonFiniteError
from lorica.methods.update import as_matrix
from lorica.train.choice import Question


def each_gradient(question: Question, take: Callable[[str, Tensor], None]) -> None:
    """Call `take` with a path and the gradient there of the summed loss of a record, as the matrix
    of `update.matrix_shape` in float32, for all places and records.

    A gradient is handed over and freed within the backward pass, so that those of all layers never
    lie in memory together. Places that a record does not reach are not called. The base's weights
    want gradients for the time of it, and are left as they were; the base answers as in evaluation.
    """
    model, task = question.model, question.task
    packed = [path for path, at in question.places.items() if is_packed(at[0], at[1] or "weight")]
    if packed:
        raise ConfigError(
            f"the weights of {len(packed)} layers are quantized and have no gradients",
            problems=packed[:3],
            mend="choose by gradients on the base in full precision, or begin otherwise: "
            "init_lora_weights: eva or loftq",
        )
    paths: dict[int, list[str]] = {}  # a tied weight has several
    weights: dict[int, nn.Parameter] = {}
    for path, (module, parameter, _) in question.places.items():
        weight: Any = module._parameters[parameter or "weight"]
        paths.setdefault(id(weight), []).append(path)
        weights[id(weight)] = weight

    def hand_over(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        for path in paths[id(weight)]:
            take(path, _matrix(gradient, question, path))

    wanted = {id(p): p.requires_grad for p in model.parameters()}
    before = {key: weight.grad for key, weight in weights.items()}
    training = model.training
    with ExitStack() as hooks:
        try:
            model.eval().requires_grad_(False)
            for weight in weights.values():
                weight.grad = None
                weight.requires_grad_(True)
                hooks.callback(weight.register_post_accumulate_grad_hook(hand_over).remove)
            for example in question.examples:
                question.between()
                with task.running(model), activate(model, None):
                    task.losses(model, task.collate([[example]], model))[0].backward()
        finally:
            for parameter in model.parameters():
                parameter.requires_grad_(wanted[id(parameter)])
            for key, weight in weights.items():
                weight.grad = before[key]
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

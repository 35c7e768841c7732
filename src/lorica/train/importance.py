"""Which entries of the base's weights matter most for a task, and an adapter of just these.

Scores of an entry w with gradient g_i on record i, after Sung et al. 2021 (arXiv 2111.09839):

    fisher            sum over i of g_i^2         the empirical Fisher information
    gradient          |sum over i of g_i|
    gradient-weight   |w sum over i of g_i|       first-order change of the loss if w were 0
    magnitude         |w|
    random            by chance

With rows or modules, the scores of what belongs together are added, and whole groups are taken, the
best first, as long as they fit into the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter, Places, attach_tensors, places_of
from lorica.attach.layers import describe, to_stored
from lorica.data.encode import Example
from lorica.errors import ConfigError, NonFiniteError
from lorica.methods.method import Layer, Tensors
from lorica.methods.sparse import Sparse
from lorica.methods.update import as_matrix, matrix_shape
from lorica.tasks.task import Task
from lorica.train.engine import derive_seed


@dataclass(frozen=True)
class Relevance:
    """What the choice came to.

    Attributes:
        chosen: path of a place -> number of its entries that train.
        sizes: path of a place -> number of its entries.
        selection: by which score.
    """

    chosen: dict[str, int]
    sizes: dict[str, int]
    selection: str

    def __str__(self) -> str:
        total = sum(self.chosen.values())
        best = sorted(self.chosen, key=lambda path: -self.chosen[path])[:3]
        shown = ", ".join(f"{path} {self.chosen[path] / total:.0%}" for path in best)
        return f"{total:,} of {sum(self.sizes.values()):,} entries by {self.selection}: {shown}"


def attach_relevant(
    model: nn.Module,
    method: Sparse,
    task: Task,
    examples: Sequence[Example],
    *,
    name: str = "default",
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> tuple[Adapter, Relevance]:
    """Put a sparse adapter on `model`, with the entries that matter most on some of `examples`.

    Args:
        method: its `selection`, `granularity` and `density` decide.
        task: what the loss is.
        examples: encoded records; `method.relevance_records` of them are drawn with `seed`.
        between: called before every record; may raise to leave.

    Raises:
        TargetError: as `attach` does. The model is unchanged.
        ConfigError: there are no records, or the budget holds not even one group.
        NonFiniteError: a gradient is NaN or infinite.
    """
    places, whole, reason = places_of(model, method)
    own = {path: place for path, place in places.items() if isinstance(place[2], Sparse)}
    layers = {path: describe(module, parameter) for path, (module, parameter, _) in own.items()}
    drawn = _draw(examples, method.relevance_records, seed) if method.needs_records else []
    if method.needs_records and not drawn:
        raise ConfigError(f"selection={method.selection} needs records, and there are none")
    scores = _scores(model, own, layers, method, task, drawn, seed, between)
    chosen = _choose(scores, method)
    tensors: dict[str, Tensors] = {}
    final: Places = {}
    for path, (module, parameter, at_place) in places.items():
        if path not in own:
            final[path] = module, parameter, at_place
            tensors[path] = at_place.start(describe(module, parameter), torch.Generator())
        elif len(chosen[path]):
            final[path] = module, parameter, replace(method, count=len(chosen[path]))
            tensors[path] = {"values": torch.zeros(len(chosen[path])), "indices": chosen[path]}
    found = Relevance(
        {path: len(indices) for path, indices in chosen.items()},
        {path: score.numel() for path, score in scores.items()},
        method.selection,
    )
    adapter = attach_tensors(model, whole, final, tensors, name=name, reason=f"{reason}; {found}")
    return adapter, found


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "relevance"))
    order = torch.randperm(len(examples), generator=generator)[:count].sort().values
    return [examples[i] for i in order.tolist()]


def _scores(
    model: nn.Module,
    places: Places,
    layers: dict[str, Layer],
    method: Sparse,
    task: Task,
    examples: Sequence[Example],
    seed: int,
    between: Callable[[], None],
) -> dict[str, Tensor]:
    """Path -> scores in the shape of `matrix_shape`, in float32."""
    matrices = {path: as_matrix(layer.stored(), layer).float() for path, layer in layers.items()}
    if method.selection == "random":
        generator = torch.Generator().manual_seed(derive_seed(seed, "chance"))
        return {path: torch.rand(m.shape, generator=generator) for path, m in matrices.items()}
    if method.selection == "magnitude":
        return {path: matrix.abs().cpu() for path, matrix in matrices.items()}
    squared = method.selection == "fisher"
    sums = _gradients(model, places, layers, task, examples, squared, between)
    if method.selection == "gradient-weight":
        sums = {path: total * matrices[path] for path, total in sums.items()}
    found = {path: total.abs().cpu() for path, total in sums.items()}
    broken = [path for path, score in found.items() if not score.isfinite().all()]
    if broken:
        raise NonFiniteError(
            f"the gradients of {len(broken)} layers are not finite", problems=broken[:10]
        )
    return found


def _gradients(
    model: nn.Module,
    places: Places,
    layers: dict[str, Layer],
    task: Task,
    examples: Sequence[Example],
    squared: bool,
    between: Callable[[], None],
) -> dict[str, Tensor]:
    """Sums over the records, one at a time, of gradients or of their squares.

    The base's weights want gradients for the time of it, and are left as they were.
    """
    weights: dict[str, nn.Parameter] = {}
    for path, (module, parameter, _) in places.items():
        weight: Any = module._parameters[parameter or "weight"]
        weights[path] = weight
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    training = model.training
    sums: dict[str, Tensor] = {}
    try:
        model.eval().requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for example in examples:
            between()
            with task.running(model), activate(model, None):
                loss = task.losses(model, task.collate([[example]], model))[0]
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for path, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    own = as_matrix(_laid_out(gradient, places[path]), layers[path]).float()
                    sums[path] = sums.get(path, 0) + (own.square() if squared else own)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])
        model.train(training)
    for path in weights:
        if path not in sums:  # no record reached it
            sums[path] = torch.zeros(matrix_shape(layers[path]))
    return sums


def _choose(scores: dict[str, Tensor], method: Sparse) -> dict[str, Tensor]:
    """Path -> ascending numbers of the entries taken, over all layers together."""
    budget = round(method.density * sum(score.numel() for score in scores.values()))
    grouped = {path: _grouped(score, method.granularity) for path, score in scores.items()}
    sizes = {path: score.numel() // len(grouped[path]) for path, score in scores.items()}
    values = torch.cat([grouped[path] / sizes[path] for path in scores])  # mean over the group
    costs = torch.cat([torch.full((len(grouped[path]),), sizes[path]) for path in scores])
    order = values.argsort(descending=True, stable=True)
    taken = order[costs[order].cumsum(0) <= budget]
    if not len(taken):
        raise ConfigError(
            f"density={method.density} allows {budget:,} entries: not one {method.granularity}",
            mend="raise density, or choose finer",
        )
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[taken] = True
    found, start = {}, 0
    for path in scores:
        groups = mask[start : start + len(grouped[path])].nonzero().flatten()
        start += len(grouped[path])
        entries = torch.arange(sizes[path])
        found[path] = (groups[:, None] * sizes[path] + entries).flatten()
    return found


def _grouped(score: Tensor, granularity: str) -> Tensor:
    """Scores of the groups, in the order of their entries."""
    if granularity == "weight":
        return score.flatten()
    if granularity == "row":
        return score.flatten(0, -2).sum(-1)
    return score.sum().reshape(1)


def _laid_out(gradient: Tensor, place: tuple[nn.Module, str | None, Any]) -> Tensor:
    """A gradient in the layout of `Layer.weight`."""
    return to_stored(place[0], place[1] or "weight", gradient)

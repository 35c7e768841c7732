"""Which entries of the base's weights matter most for a task: the choice behind `Sparse`.

Scores of an entry w with gradient g_i on record i, after Sung et al. 2021 (arXiv 2111.09839):

    fisher            sum over i of g_i^2         the empirical Fisher information
    gradient          |sum over i of g_i|
    gradient-weight   |w sum over i of g_i|       first-order change of the loss if w were 0
    gradient-input    sum over i of |w g_i|       gradient times input along each connection
    magnitude         |w|
    random            by chance

The gradient of a weight is the gradient of its output times its input, so w g is what the input
brought along this connection times the gradient there: gradient x input (Shrikumar et al. 2016,
arXiv 1605.01713). For a group (a neuron, a head, a layer) it is |sum of w g_i| within the record,
since what a group says is the sum of its connections; all other scores of a group are the sum of
those of its entries. Whole groups are taken, the best mean first, as long as they fit into the
budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorica.attach.survey import layer_number
from lorica.errors import ConfigError
from lorica.methods.method import Tensors
from lorica.methods.sparse import Sparse
from lorica.methods.update import as_matrix, matrix_shape
from lorica.train.choice import Answer, Question, Relevance
from lorica.train.gradients import each_gradient, refuse_broken
from lorica.train.groups import Grouping, grouping_of
from lorica.train.seed import derive_seed


def choose(question: Question) -> Answer:
    """The entries of every place.

    Raises:
        ConfigError: the budget holds not even one group, or there are no heads to choose.
        NonFiniteError: a gradient is NaN or infinite.
    """
    method: Sparse = question.method
    groupings = {p: grouping_of(question, p, method.granularity) for p in question.places}
    scores, entries = _scores(question, groupings)
    chosen = _choose(scores, groupings, method)
    own = {p: replace(method, count=len(taken)) for p, taken in chosen.items() if len(taken)}
    tensors: dict[str, Tensors] = {
        path: {"values": torch.zeros(len(chosen[path])), "indices": chosen[path]} for path in own
    }
    relevance = Relevance(
        measure=method.selection,
        unit="entries",
        values=entries,
        chosen={path: len(indices) for path, indices in chosen.items()},
        sizes={path: grouping.numel for path, grouping in groupings.items()},
        heads={
            path: tuple(score.tolist())
            for path, score in scores.items()
            if method.granularity == "head"
        },
        groups=scores if method.granularity in ("row", "head") else {},
    )
    return Answer(method, own, tensors, relevance)


def _scores(
    question: Question, groupings: dict[str, Grouping]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Path -> scores of its groups, in float32 on the CPU; and path -> score of the whole place."""
    method, layers = question.method, question.layers
    if method.selection == "random":
        generator = torch.Generator().manual_seed(derive_seed(question.seed, "chance"))
        entries = {p: torch.rand(matrix_shape(at), generator=generator) for p, at in layers.items()}
    elif method.selection == "gradient-input":
        return _gradient_input(question, groupings)
    else:
        entries = _entries(question)
    found = {path: groupings[path].sum(entries[path]) for path in groupings}
    return found, {path: score.sum().item() for path, score in found.items()}


def _entries(question: Question) -> dict[str, Tensor]:
    """Path -> scores of single entries."""
    selection = question.method.selection
    matrices = {p: as_matrix(at.stored(), at) for p, at in question.layers.items()}
    if selection == "magnitude":
        return {path: matrix.float().abs().cpu() for path, matrix in matrices.items()}
    sums: dict[str, Tensor] = {}

    def add(path: str, gradient: Tensor) -> None:
        more = gradient.square() if selection == "fisher" else gradient
        sums[path] = sums[path].add_(more) if path in sums else more.clone()

    each_gradient(question, add)
    if selection == "gradient-weight":
        sums = {path: total * matrices[path].float() for path, total in sums.items()}
    refuse_broken(sums)
    shapes = {path: matrix_shape(at) for path, at in question.layers.items()}
    return {p: sums[p].abs().cpu() if p in sums else torch.zeros(shapes[p]) for p in shapes}


def _gradient_input(
    question: Question, groupings: dict[str, Grouping]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sums over the records of |what a group brought|, and of |what a place brought|."""
    groups = {path: torch.zeros(grouping.count) for path, grouping in groupings.items()}
    places = {path: torch.zeros(()) for path in groupings}
    matrices = {p: as_matrix(at.stored(), at) for p, at in question.layers.items()}

    def add(path: str, gradient: Tensor) -> None:
        brought = gradient * matrices[path].float()
        groups[path] += groupings[path].sum(brought).abs().cpu()
        places[path] += brought.sum().abs().cpu()

    each_gradient(question, add)
    refuse_broken(groups)
    return groups, {path: value.item() for path, value in places.items()}


def _choose(
    scores: dict[str, Tensor], groupings: dict[str, Grouping], method: Sparse
) -> dict[str, Tensor]:
    """Path -> ascending numbers of the entries taken, over all layers together."""
    budget = round(method.density * sum(grouping.numel for grouping in groupings.values()))
    members = list(_members(scores, method.granularity))
    means = [
        sum(scores[p] for p in paths) / sum(groupings[p].size for p in paths) for paths in members
    ]
    costs = [
        (groupings[paths[0]].count, sum(groupings[p].size for p in paths)) for paths in members
    ]
    taken = _best(torch.cat(means), costs, budget)  # type: ignore[arg-type]
    if not len(taken):
        raise ConfigError(
            f"density={method.density} allows {budget:,} entries: not one {method.granularity}",
            mend="raise density, or choose finer",
        )
    mask = torch.zeros(sum(count for count, _ in costs), dtype=torch.bool)
    mask[taken] = True
    found, start = {}, 0
    for paths in members:
        count = groupings[paths[0]].count
        for path in paths:
            found[path] = groupings[path].entries(mask[start : start + count])
        start += count
    return {path: found[path] for path in scores}


def _best(values: Tensor, costs: Sequence[tuple[int, int]], budget: int) -> Tensor:
    """Numbers of the groups that are taken: the best first, as long as they fit into the budget.

    Args:
        costs: for each stretch of groups their number, and the entries of each.
    """
    sizes = {size for _, size in costs}
    if len(sizes) == 1:  # as with single entries, where an order of all would take much memory
        return values.topk(min(len(values), budget // sizes.pop()), sorted=False).indices
    cost = torch.cat([torch.full((count,), size) for count, size in costs])
    order = values.argsort(descending=True, stable=True)
    return order[cost[order].cumsum(0) <= budget]


def _members(scores: dict[str, Tensor], granularity: str) -> Iterator[list[str]]:
    """Places whose groups belong together: all of a layer of the model, else each alone."""
    if granularity != "layer":
        yield from ([path] for path in scores)
        return
    layers: dict[int | str, list[str]] = {}
    for path in scores:
        number = layer_number(path)
        stack = path.partition(f".{number}.")[0] if number is not None else path
        layers.setdefault(stack if number is None else f"{stack}.{number}", []).append(path)
    yield from layers.values()

"""EVA: A begins as the directions in which the layer's inputs vary most, B as zero.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation" (arXiv 2410.07170). The right singular vectors of the centred inputs of every layer are
found batch by batch (Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", eq. 4 to
6), until none of those that are needed moves. The ranks of all layers together then go to the
directions that explain the largest shares of the variance of their layer, at most eva_rho times r
to a layer; a layer that gets none is left out. lora_alpha follows the rank, so that the scale of a
layer's update stays what it was.

Inputs are those of the tokens that carry a label, as in PEFT; of all tokens where labels do not
stand at tokens, and of whatever rows a layer sees that is not given every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.data.encode import IGNORED, Example
from lorica.errors import ConfigError, NonFiniteError
from lorica.methods.method import Tensors
from lorica.tasks.task import answering
from lorica.train.choice import Answer, Question, Relevance

RECORDS_PER_BATCH = 8
MAX_BATCHES = 200
"""After which the directions are taken as they are, and that is said."""


@dataclass(eq=False)
class Components:
    """Incremental principal components of rows (n, d), in float32; sums in float64.

    Attributes:
        k: how many are kept.
        directions: (k, d), the largest first; the largest entry of each is positive.
        ratios: (k,), share of the variance that each explains.
        same: (k,), whether it moved less than eva_tau in the newest batch.
    """

    k: int
    count: int = 0
    total: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    directions: Tensor = field(default_factory=lambda: torch.empty(0))
    ratios: Tensor = field(default_factory=lambda: torch.empty(0))
    same: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def add(self, rows: Tensor, tau: float) -> None:
        """Take further rows; the first time at least `k` of them."""
        n, rows = len(rows), rows.float()
        mean = rows.mean(0, dtype=torch.float64)
        centred = rows - mean.to(rows.dtype)
        self.total += centred.double().square().sum().item()
        parts = [centred]
        if self.count:
            weight = self.count * n / (self.count + n)
            step = self.mean - mean
            self.total += weight * step.square().sum().item()
            before = self.values.unsqueeze(1) * self.directions
            parts = [before, centred, (math.sqrt(weight) * step).to(rows.dtype).unsqueeze(0)]
        self.mean = (self.mean * self.count + mean * n) / (self.count + n) if self.count else mean
        self.count += n
        _, S, Vh = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        found, self.values = Vh[: self.k], S[: self.k]
        largest = found.abs().argmax(1, keepdim=True)
        found = found * found.gather(1, largest).sign()
        self.ratios = self.values.double().square().cpu() / max(self.total, 1e-300)
        if self.directions.numel():
            cosines = torch.nn.functional.cosine_similarity(found, self.directions)
            self.same = (cosines >= tau).cpu()
        else:
            self.same = torch.zeros(self.k, dtype=torch.bool)
        self.directions = found


def choose(question: Question) -> Answer:
    """Ranks and factors for the places.

    Raises:
        ConfigError: too few records for the ranks, or layers whose inputs are not seen.
        NonFiniteError: an input is NaN or infinite.
    """
    method = question.method
    _refuse_read(question)
    limits = {path: _limit(question, path) for path in question.places}
    groups = _same_inputs(question)
    for paths in groups.values():  # one search for all that see the same
        widest = max(limits[path] for path in paths)
        limits |= {path: min(widest, _smallest(question, path)) for path in paths}
    found = {first: Components(max(limits[p] for p in paths)) for first, paths in groups.items()}
    of = {path: found[first] for first, paths in groups.items() for path in paths}
    ranks = dict(limits)
    waiting: dict[str, list[Tensor]] = {first: [] for first in groups}
    settled = False
    batches = _batches(question.examples)
    for number, batch in enumerate(cycle(batches)):
        open_ = [f for f, paths in groups.items() if not _settled(found[f], ranks, paths)]
        settled = not open_
        if settled or number == MAX_BATCHES:
            break
        _gather(question, {first: waiting[first] for first in open_}, batch)
        for first in open_:
            if sum(map(len, waiting[first])) >= found[first].k:
                found[first].add(torch.cat(waiting[first]), method.eva_tau)
                waiting[first].clear()
        begun = all(components.count for components in found.values())
        if begun:
            ranks = _ranks(question, of, limits)
        elif number + 1 == len(batches):
            raise _too_few(question, found, waiting)
    return _answer(question, of, limits, ranks, settled)


def _settled(components: Components, ranks: dict[str, int], paths: Sequence[str]) -> bool:
    needed = max(ranks[path] for path in paths)
    return bool(components.count) and bool(components.same[:needed].all())


def _ranks(question: Question, of: dict[str, Components], limits: dict[str, int]) -> dict[str, int]:
    """Path -> rank: the shares of variance of all layers in one order, as far as the ranks go."""
    budget = sum(method.r for _, _, method in question.places.values())  # type: ignore[attr-defined]
    keys = [path for path in of for _ in range(limits[path])]
    shares = torch.cat([of[path].ratios[: limits[path]] for path in of])
    ranks = dict.fromkeys(of, 0)
    for i in shares.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[keys[i]] += 1
    return ranks


def _answer(
    question: Question,
    of: dict[str, Components],
    limits: dict[str, int],
    ranks: dict[str, int],
    settled: bool,
) -> Answer:
    own: dict[str, Any] = {}
    tensors: dict[str, Tensors] = {}
    generator = torch.Generator().manual_seed(0)
    for path, rank in ranks.items():
        if not rank:
            continue
        before: Any = question.places[path][2]
        grown = rank / before.r
        alpha = before.lora_alpha * (math.sqrt(grown) if before.use_rslora else grown)
        own[path] = replace(before, r=rank, lora_alpha=alpha)
        A = of[path].directions[:rank].cpu().contiguous()
        tensors[path] = {**own[path].start(question.layers[path], generator), "A": A}
    dropped = [path for path, rank in ranks.items() if not rank]
    shown = ", ".join(dropped[:3])
    notes = [f"no rank for {len(dropped)} of {len(ranks)} layers ({shown})"] if dropped else []
    if not settled:
        notes.append(f"some directions still moved after {MAX_BATCHES} batches")
    relevance = Relevance(
        measure="variance explained",
        unit="ranks",
        values={path: of[path].ratios[:rank].sum().item() for path, rank in ranks.items()},
        chosen=ranks,
        sizes=limits,
        notes=tuple(notes),
    )
    base = question.method
    whole = replace(
        base,
        rank_pattern={path: m.r for path, m in own.items() if m.r != base.r},
        alpha_pattern={
            path: m.lora_alpha for path, m in own.items() if m.lora_alpha != base.lora_alpha
        },
    )
    return Answer(whole, own, tensors, relevance)


# --- inputs ---------------------------------------------------------------------------------------


def _batches(examples: Sequence[Example]) -> list[Sequence[Example]]:
    size = RECORDS_PER_BATCH
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def _gather(question: Question, into: dict[str, list[Tensor]], batch: Sequence[Example]) -> None:
    """Append the inputs (n, d) that the records of a batch give to the layers."""
    for example in batch:
        question.between()
        given, width = _inputs(question, list(into), example)
        for path, rows in into.items():
            if path in given:
                rows.append(_labelled(given[path], example, width))


def _inputs(
    question: Question, paths: Sequence[str], example: Example
) -> tuple[dict[str, Tensor], int]:
    """Run the base on a record: path -> inputs (n, d) of the layer; and the number of tokens that
    the model was given.
    """
    model, task = question.model, question.task
    given: dict[str, Tensor] = {}
    with activate(model, None), answering(model):
        batch = task.collate([[example]], model)
        with task.running(model), _seen(question, paths, given):
            task.losses(model, batch)
    return given, batch.inputs["input_ids"].numel()


@contextmanager
def _seen(question: Question, paths: Sequence[str], given: dict[str, Tensor]) -> Iterator[None]:
    """Put the inputs (n, d) of every call of these layers into `given`, by path."""
    with ExitStack() as hooks:
        for path in paths:
            module: nn.Module = question.places[path][0]

            def look(module: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
                x = (args[0] if args else next(iter(kwargs.values()))).flatten(0, -2)
                given[path] = torch.cat([given[path], x]) if path in given else x

            handle = module.register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _labelled(x: Tensor, example: Example, width: int) -> Tensor:
    """The rows (n, d) that count; see the head of this file."""
    rows, length = x.detach(), len(example.input_ids)
    if not rows.isfinite().all():
        raise NonFiniteError(
            "the base makes numbers that are not finite from a record",
            problems=[f"record {example.row + 1}"],
            mend="use dtype: float32",
        )
    if len(rows) != width:
        return rows
    if len(example.labels) != length:
        return rows[:length]
    carries = torch.tensor([label != IGNORED for label in example.labels], device=rows.device)
    return rows[:length][carries]


def _same_inputs(question: Question) -> dict[str, list[str]]:
    """The places by what they are given: the first of each group -> all of it.

    Raises:
        ConfigError: a layer is not called.
    """
    _inputs(question, [], question.examples[0])  # a task may run a model to find out about it
    given, _ = _inputs(question, list(question.places), question.examples[0])
    missing = [path for path in question.places if path not in given]
    if missing:
        raise ConfigError(
            f"{len(missing)} layers are not called for the first record, so eva sees no inputs",
            problems=missing[:10],
            mend="leave them out with exclude_modules",
        )
    groups: dict[tuple, list[str]] = {}
    for path in question.places:
        x = given[path]
        key = x.data_ptr(), x._version, tuple(x.shape), x.stride()
        groups.setdefault(key, []).append(path)
    return {paths[0]: paths for paths in groups.values()}


# --- limits ---------------------------------------------------------------------------------------


def _limit(question: Question, path: str) -> int:
    """The largest rank that a place may get."""
    method: Any = question.places[path][2]
    return min(round(method.r * method.eva_rho), _smallest(question, path))


def _smallest(question: Question, path: str) -> int:
    layer = question.layers[path]
    return min(layer.in_features, layer.out_features)


def _refuse_read(question: Question) -> None:
    read = [path for path, (_, parameter, _) in question.places.items() if parameter is not None]
    if read:
        raise ConfigError(
            f"other code reads the weights of {len(read)} layers, so eva does not see their inputs",
            problems=read[:10],
            mend="leave them out with exclude_modules, or choose another init_lora_weights",
        )


def _too_few(
    question: Question, found: dict[str, Components], waiting: dict[str, list[Tensor]]
) -> ConfigError:
    short = [path for path, components in found.items() if not components.count]
    return ConfigError(
        f"{len(question.examples)} records give {len(short)} layers too few inputs for eva",
        problems=[
            f"{path}: {sum(map(len, waiting[path]))} of at least {found[path].k}"
            for path in short[:10]
        ],
        mend="raise init_records, or lower r or eva_rho",
    )

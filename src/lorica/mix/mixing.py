"""Several adapters as one: a LoRA adapter whose update is made of theirs, place by place.

    error = |D - sum_i w_i D_i| / |sum_i w_i D_i|        lost = |D - D*| / |D*|

D is the update of the new adapter, D_i those of the given ones, D* what the way of mixing makes
before it is cut to a rank; norms of Frobenius, over all places together. `error` tells how far the
new adapter is from the exact weighted sum, which `activate` gives at run time and `cat` in a file.
Ways that mean something else than the sum (TIES, DARE, SLERP) differ from it on purpose.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import with_stages
from lorica.attach.attach import attach_tensors
from lorica.attach.handle import Adapter, adapters, find
from lorica.attach.layers import describe
from lorica.attach.places import Places
from lorica.attach.plates import Slot
from lorica.errors import ConfigError, LoricaWarning, MergeError, folded
from lorica.methods.copy import Copy
from lorica.methods.lora import LoRA
from lorica.methods.method import Layer
from lorica.methods.tokens import Tokens
from lorica.mix.update import Update, distance, to_tensors, update_of
from lorica.mix.ways import DENSE, SAMPLED, WAYS, Choices, exact, find_way
from lorica.ops.low_rank import factorise, truncate


@dataclass(frozen=True)
class MixedPlace:
    """What became of one place.

    Attributes:
        path: of the place.
        rank: of the new factors; 0 for copies of parameters.
        error: relative distance from the exact weighted sum.
        lost: share that cutting to the rank took off; 0 where nothing was cut.
        size: norm of the exact weighted sum.
        made: norm of what the way makes, before it is cut.
    """

    path: str
    rank: int
    error: float
    lost: float
    size: float
    made: float


@dataclass(frozen=True)
class MixReport:
    """What `mix` made.

    Attributes:
        adapter: the new one, attached beside those that it was made of.
        method: the way.
        weights: adapter -> its weight.
        places: one entry each.
        settings: r, density, seed and majority_sign_method, as far as they had an effect.
    """

    adapter: Adapter
    method: str
    weights: Mapping[str, float]
    places: tuple[MixedPlace, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative distance from the exact weighted sum, over all places."""
        return _overall([(p.error * p.size, p.size) for p in self.places])

    @property
    def lost(self) -> float:
        """What cutting to the rank took off, over all places."""
        return _overall([(p.lost * p.made, p.made) for p in self.places])

    def facts(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        head = {"method": self.method, "weights": dict(self.weights), **self.settings}
        places = [vars(place) for place in self.places]
        return {**head, "error": self.error, "lost": self.lost, "places": places}

    def __str__(self) -> str:
        mixture = ", ".join(f"{name} x {weight:g}" for name, weight in self.weights.items())
        ranks = sorted({place.rank for place in self.places if place.rank})
        rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "") if ranks else "copies"
        said = f"{self.method} of {mixture}: {len(self.places)} places, {rank}; "
        said += f"{self.error:.2%} away from the exact weighted sum"
        return said + (f", {self.lost:.2%} lost by the rank" if self.lost > 1e-6 else "")


def mix(
    model: nn.Module,
    mixture: Mapping[str, float],
    *,
    name: str = "mixed",
    method: str = "cat",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    majority_sign_method: str = "total",
) -> MixReport:
    """Make one LoRA adapter of several adapters, and put it on the model beside them.

    Args:
        mixture: names (or one) of attached adapters with their weights, which may be negative. What
            they lie on takes part with the same weight. Any method that is a change of a weight
            takes part; adapters may have different ranks, places and methods.
        name: of the new adapter.
        method: "cat" (exact, the ranks add up), "svd" (the exact sum cut to rank r), "slerp",
            "ties", "dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "linear"; see
            `mix.ways` for the formulas. Where not all updates are products of factors, `cat` is not
            possible and the others need an r.
        r: rank of the result; None: the sum of the ranks.
        density: share of the elements that ties, dare_* and magnitude_prune keep.
        seed: of what DARE drops.
        majority_sign_method: how ties elects a sign: "total" or "frequency".

    Returns:
        the adapter, and at every place how far it is from the exact sum. A warning says where
        `linear` is not what was asked for.

    Raises:
        ConfigError: unknown adapters or settings that do not go together.
        MergeError: an adapter is no change of weights, or one place has no sum. The model is
            unchanged.
    """
    way = find_way(method)
    weights = _weights(model, mixture)
    settings = _settings(way, weights, r, density, majority_sign_method)
    known = adapters(model)
    paths = dict.fromkeys(path for given in weights for path in known[given].slots)
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = {
        path: [(w, known[n].slots[path]) for n, w in weights.items() if path in known[n].slots]
        for path in paths
    }
    layers = {path: _layer(modules, path) for path in paths}
    updates = _updates(parts, layers, way, r)
    places: Places = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    entries = []
    for path, found in updates.items():
        layer, (module, parameter) = layers[path], _seat(modules, path)
        if found is None:
            own, tensors[path], entry = _copied(path, parts[path], layer)
        else:
            choices = _choices(density, majority_sign_method, seed, path)
            made, entry = _made(path, found, [w for w, _ in parts[path]], way, choices, r, layer)
            own, tensors[path] = LoRA(r=entry.rank, lora_alpha=entry.rank), to_tensors(made, layer)
        places[path] = module, parameter, own
        entries.append(entry)
    settings_of = _method_of(places, known, weights)
    reason = f"{way} of {', '.join(f'{n} x {w:g}' for n, w in weights.items())}"
    adapter = attach_tensors(model, settings_of, places, tensors, name=name, reason=reason)
    if way in SAMPLED:
        settings["seed"] = seed
    report = MixReport(adapter, way, weights, tuple(entries), settings)
    _warn(report)
    return report


def _weights(model: nn.Module, mixture: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(mixture, Mapping) or not mixture:
        raise ConfigError("a mixture names adapters with weights", expected='{"a": 0.7, "b": 0.3}')
    given = {find(model, name).name: weight for name, weight in mixture.items()}
    wrong = [
        f"the weight of {name!r} is {weight!r}; it must be a finite number"
        for name, weight in given.items()
        if isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not math.isfinite(weight)
    ]
    wrong += [
        f"{name} is stacked on another adapter: what it does depends on that one"
        for name in given
        if find(model, name).stacked
    ]
    if wrong:
        raise ConfigError("these adapters cannot be mixed so", problems=wrong)
    return with_stages(model, {name: float(weight) for name, weight in given.items()})


def _settings(
    way: str, weights: Mapping[str, float], r: int | None, density: float | None, majority: str
) -> dict[str, Any]:
    """What has an effect. Raises ConfigError for what has none, or is missing."""
    problems = []
    prunes, elects = way in DENSE, way in ("ties", "dare_ties")
    if prunes and density is None:
        problems.append(f"{way} needs a density: the share of the elements that it keeps")
    if density is not None and not prunes:
        problems.append(f"density has no effect on {way}")
    if density is not None and not 0 < density <= 1:
        problems.append(f"density is {density!r}; it must be above 0 and at most 1")
    if majority not in ("total", "frequency"):
        problems.append(f"majority_sign_method is {majority!r}; it is total or frequency")
    elif majority != "total" and not elects:
        problems.append(f"majority_sign_method has no effect on {way}")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        problems.append(f"r is {r!r}; it must be a whole number from 1")
    if r is not None and way in ("cat", "linear"):
        problems.append(f"r has no effect on {way}; svd cuts the same sum to a rank")
    if way == "slerp" and (len(weights) != 2 or abs(sum(weights.values()) - 1) > 1e-6):
        problems.append("slerp goes from one adapter to another: two weights with the sum 1")
    if problems:
        raise ConfigError("these settings do not go together", problems=problems)
    found: dict[str, Any] = {"r": r, "density": density}
    if elects:
        found["majority_sign_method"] = majority
    return {key: value for key, value in found.items() if value is not None}


def _updates(
    parts: Mapping[str, list[tuple[float, Slot]]],
    layers: Mapping[str, Layer],
    way: str,
    r: int | None,
) -> dict[str, list[Update] | None]:
    """The updates at every place; None where the place holds copies of parameters.

    Raises:
        MergeError: all places that have no sum, with the reasons.
    """
    found: dict[str, list[Update] | None] = {}
    problems: list[tuple[str, str]] = []
    for path, given in parts.items():
        kinds = {slot.method.kind for _, slot in given}
        if any(isinstance(slot.method, Tokens) for _, slot in given):
            problems.append((path, "rows of single tokens are not mixed"))
        elif all(isinstance(slot.method, Copy) for _, slot in given):
            found[path] = None
        elif any(isinstance(slot.method, Copy) for _, slot in given):
            problems.append((path, f"{' and '.join(sorted(kinds))} have no sum in one adapter"))
        else:
            read = [update_of(slot, layers[path]) for _, slot in given]
            problems += [(path, text) for text in read if isinstance(text, str)]
            updates = found[path] = [update for update in read if isinstance(update, Update)]
            if r is None and any(update.rank is None for update in updates):
                why = f"the update of {' and '.join(sorted(kinds))} is no product of thin factors"
                problems.append((path, f"{why}: give r, and choose svd instead of {way}"))
            elif way == "cat" and any(update.rank is None for update in updates):
                problems.append((path, "cat stacks factors, and there are none"))
    if problems:
        raise MergeError("these adapters cannot be mixed so", problems=folded(problems)[:20])
    return found


def _made(
    path: str,
    updates: list[Update],
    weights: list[float],
    way: str,
    choices: Choices,
    r: int | None,
    layer: Layer,
) -> tuple[Update, MixedPlace]:
    """The new update of a place, as factors."""
    made = WAYS[way](updates, weights, choices)
    wanted = exact(updates, weights, choices)
    own = min((made.A if made.A is not None else made.matrix()).shape[-1], layer.out_features)
    most = sum(update.rank or 0 for update in updates) if r is None else r
    cut = made
    if made.A is None:
        A, B, _ = factorise(made.matrix(), min(most, own))
        cut = Update(A, B, None)
    elif (r is not None and r < made.A.shape[-2]) or made.A.shape[-2] > own:
        assert made.B is not None
        A, B, _ = truncate(made.A * made.scale, made.B, min(most, own))
        cut = Update(A, B, None)
    assert cut.rank is not None
    size, norm = wanted.norm(), made.norm()
    off = 0.0 if cut is wanted or way in ("cat", "task_arithmetic") else distance(cut, wanted)
    lost = 0.0 if cut is made else distance(cut, made)
    entry = MixedPlace(
        path,
        cut.rank,
        off / size if size else off,
        lost / norm if norm else lost,
        size,
        norm,
    )
    return cut, entry


def _copied(
    path: str, parts: list[tuple[float, Slot]], layer: Layer
) -> tuple[Copy, dict[str, Tensor], MixedPlace]:
    """Copies of parameters: W + sum_i w_i (W_i - W), which is exact."""
    own = parts[0][1].method
    assert isinstance(own, Copy)
    base = layer.parameters()
    tensors = {}
    for key in dict.fromkeys(key for _, slot in parts for key in slot.tensors):
        held = [(w, slot.tensors[key].detach()) for w, slot in parts if key in slot.tensors]
        if abs(sum(w for w, _ in held) - 1) < 1e-9:  # then the base has no part in it
            tensors[key] = torch.stack([w * t.float() for w, t in held]).sum(0)
        else:
            tensors[key] = base[key] + sum(w * (t.float() - base[key]) for w, t in held)
    only = own.only if all(s.method == own for _, s in parts) else tuple(tensors)
    return Copy(only, own.tied_to), tensors, MixedPlace(path, 0, 0.0, 0.0, 0.0, 0.0)


def _method_of(places: Places, known: Mapping[str, Adapter], weights: Mapping[str, float]) -> LoRA:
    """The settings of the whole adapter: the rank of most of its places, and the others by name."""
    ranks = {path: own.r for path, (_, _, own) in places.items() if isinstance(own, LoRA)}
    if not ranks:
        raise MergeError("there is nothing to mix but copies of parameters")
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {path: rank for path, rank in ranks.items() if rank != usual}
    saved = [getattr(known[name].method, "modules_to_save", ()) for name in weights]
    return LoRA(
        r=usual,
        lora_alpha=usual,
        target_modules=tuple(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other),
        modules_to_save=tuple(dict.fromkeys(one for names in saved for one in names)),
    )


def _layer(modules: Mapping[str, nn.Module], path: str) -> Layer:
    module, parameter = _seat(modules, path)
    return describe(module, parameter)


def _seat(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str | None]:
    if path in modules:
        return modules[path], None
    core, _, parameter = path.rpartition(".")
    return modules[core], parameter


def _choices(density: float | None, majority: str, seed: int, path: str) -> Choices:
    """DARE draws by seed and place, so the order of the places has no part in it."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return Choices(1.0 if density is None else density, majority, generator)


def _overall(pairs: list[tuple[float, float]]) -> float:
    whole = sum(size**2 for _, size in pairs)
    return math.sqrt(sum(off**2 for off, _ in pairs) / whole) if whole else 0.0


def _warn(report: MixReport) -> None:
    if report.method == "linear" and report.error > 1e-3:
        warnings.warn(
            f"linear sums the factors A and B of the adapters apart, so products of different "
            f"adapters come in: {report.error:.1%} of the result is not the weighted sum; choose "
            "cat, which is exact, or svd for a smaller rank",
            LoricaWarning,
            stacklevel=3,
        )

"""LoRA out of a full fine-tune: the best thin product for what training changed in every weight.

    W' - W  ~  B A        error(r) = sqrt(sum_{i>r} s_i^2 / sum_i s_i^2), s the singular values

No product of rank r is nearer (Eckart and Young 1936). With an energy, every layer gets the
smallest rank that holds so much of the squared change. Weights are read from the files of both
models one after the other; neither model is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.attach import attach_tensors
from lorica.attach.handle import Adapter
from lorica.attach.layers import describe, to_stored
from lorica.attach.places import Places, places_of
from lorica.errors import ConfigError, MergeError
from lorica.files.stored_weights import StoredWeights
from lorica.methods.copy import Copy
from lorica.methods.lora import LoRA
from lorica.methods.method import Layer
from lorica.methods.update import as_matrix
from lorica.mix.update import Update, to_tensors
from lorica.ops.low_rank import factorise, factorise_quickly, rank_of_energy

QUICK_FROM = 768
"""The smaller side of a matrix from which the randomised SVD is taken by itself."""
KEPT = 64
"""So many singular values of a place are kept for the report."""
SVDS = ("auto", "exact", "randomised")


@dataclass(frozen=True)
class ExtractedPlace:
    """What was taken out of one weight.

    Attributes:
        path: of the layer.
        rank: of the factors.
        error: share of the change (norm) that they do not hold.
        size: norm of the change.
        relative: of the change to the weight.
        spectrum: the largest singular values of the change.
    """

    path: str
    rank: int
    error: float
    size: float
    relative: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` made.

    Attributes:
        adapter: on the model that was given, which needs no weights.
        places: one entry each; layers that did not change are none.
        left_out: other weights that changed (norms, biases, layers that were not chosen), by the
            norm of their change.
    """

    adapter: Adapter
    places: tuple[ExtractedPlace, ...]
    left_out: Mapping[str, float]

    @property
    def error(self) -> float:
        """Share of the change (norm) of the chosen layers that the adapter does not hold."""
        whole = sum(place.size**2 for place in self.places)
        lost = sum((place.error * place.size) ** 2 for place in self.places)
        return math.sqrt(lost / whole) if whole else 0.0

    @property
    def error_of_all(self) -> float:
        """The same over all weights that changed, also those that were left out."""
        outside = sum(size**2 for size in self.left_out.values())
        whole = sum(place.size**2 for place in self.places) + outside
        lost = sum((place.error * place.size) ** 2 for place in self.places) + outside
        return math.sqrt(lost / whole) if whole else 0.0

    def facts(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "error": self.error,
            "error_of_all": self.error_of_all,
            "left_out": dict(self.left_out),
            "places": [{**vars(p), "spectrum": list(p.spectrum)} for p in self.places],
        }

    def __str__(self) -> str:
        ranks = sorted({place.rank for place in self.places})
        rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "")
        said = f"{len(self.places)} layers, {rank}: {self.error:.2%} of their change is not held"
        if self.left_out:
            said += (
                f"; {len(self.left_out)} other weights changed too and are left out, with them "
                f"{self.error_of_all:.2%}"
            )
        return said


def extract(
    model: nn.Module,
    tuned: list[Path],
    base: list[Path],
    *,
    r: int | None = None,
    energy: float | None = None,
    target_modules: str | tuple[str, ...] = "all-linear",
    svd: str = "auto",
    seed: int = 0,
    name: str = "extracted",
) -> ExtractReport:
    """Make a LoRA adapter of what a full fine-tune changed.

    Args:
        model: the base as `base.empty.empty_model` makes it; the adapter is put on it.
        tuned, base: the *.safetensors of both models.
        r: rank at every layer, 16 where nothing is said; with an energy the largest rank.
        energy: share of the squared change that every layer's rank must hold.
        target_modules: layers, as for training.
        svd: "exact", "randomised" (some products with thin matrices), or "auto": by size.
        seed: of the randomised one.

    Raises:
        ConfigError: settings out of range, or models that are not of one architecture.
        MergeError: nothing that was chosen has changed.
    """
    _check(r, energy, svd)
    places, _, _ = places_of(model, LoRA(r=1, target_modules=target_modules))
    found: Places = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    entries = []
    with StoredWeights(model, tuned) as new, StoredWeights(model, base) as old:
        _check_alike(new, old)
        for path, (module, parameter, own) in places.items():
            full = path if parameter else f"{path}.weight"
            if isinstance(own, Copy) or full not in new:
                continue
            layer = describe(module, parameter)
            change = _matrix(new.read(full), module, parameter, layer)
            weight = _matrix(old.read(full), module, parameter, layer)
            change -= weight
            if not change.any():
                continue
            update, entry = _factors(path, change, float(weight.norm()), r, energy, svd, seed)
            tensors[path] = to_tensors(update, layer)
            found[path] = module, parameter, LoRA(r=entry.rank, lora_alpha=entry.rank)
            entries.append(entry)
        seats = [(path, parameter) for path, (_, parameter, _) in places.items()]
        taken = {path if parameter else f"{path}.weight" for path, parameter in seats}
        left_out = _others(new, old, taken)
    if not entries:
        raise MergeError(
            "no layer that was chosen has changed from the base to the tuned model",
            mend="name other layers with target_modules"
            if left_out
            else "give the tuned model first and its base second",
        )
    ranks = {entry.path: entry.rank for entry in entries}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {path: rank for path, rank in ranks.items() if rank != usual}
    method = LoRA(
        r=usual, lora_alpha=usual, target_modules=tuple(ranks), rank_pattern=other,
        alpha_pattern=dict(other),
    )  # fmt: skip
    reason = "extracted from a full fine-tune"
    adapter = attach_tensors(model, method, found, tensors, name=name, reason=reason)
    return ExtractReport(adapter, tuple(entries), left_out)


def _check(r: int | None, energy: float | None, svd: str) -> None:
    problems = []
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        problems.append(f"r is {r!r}; it must be a whole number from 1")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy is {energy!r}; it must be above 0 and at most 1")
    if svd not in SVDS:
        problems.append(f"svd is {svd!r}; it is one of {', '.join(SVDS)}")
    if problems:
        raise ConfigError("nothing can be extracted so", problems=problems)


def _check_alike(new: StoredWeights, old: StoredWeights) -> None:
    missing = sorted({*new} ^ {*old})
    shapes = [n for n in new if n in old and new.kind(n)[1] != old.kind(n)[1]]
    if missing or shapes:
        raise ConfigError(
            "these are not a model and what it was tuned from: their tensors differ",
            problems=[f"{n} is in one of them only" for n in missing[:5]]
            + [f"{n} has the shape {new.kind(n)[1]}, and {old.kind(n)[1]}" for n in shapes[:5]],
        )


def _matrix(stored: Tensor, module: nn.Module, parameter: str | None, layer: Layer) -> Tensor:
    """A tensor of the file as the matrix that a method sees, in float32 or wider."""
    wide = stored if stored.dtype == torch.float64 else stored.float()
    return as_matrix(to_stored(module, parameter or "weight", wide), layer).clone()


def _factors(
    path: str,
    change: Tensor,
    size_of_weight: float,
    r: int | None,
    energy: float | None,
    svd: str,
    seed: int,
) -> tuple[Update, ExtractedPlace]:
    """The nearest thin product of a change (.., O, K)."""
    whole = float(change.double().square().sum())
    most = min(change.shape[-2:])
    A, B, S, rank = _decomposed(change, most, whole, r, energy, svd, seed)
    kept = Update(A[..., :rank, :], B[..., :rank], None)
    lost = max(0.0, 1 - kept.norm() ** 2 / whole)  # what is kept is at right angles to what is not
    size = math.sqrt(whole)
    spectrum = S if S.dim() == 1 else S.square().sum(0).sqrt()
    return kept, ExtractedPlace(
        path,
        rank,
        math.sqrt(lost),
        size,
        size / size_of_weight if size_of_weight else math.inf,
        tuple(spectrum[:KEPT].tolist()),
    )


def _decomposed(
    change: Tensor,
    most: int,
    whole: float,
    r: int | None,
    energy: float | None,
    svd: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Factors, singular values, and the rank that is kept of them."""
    limit = min(most, r or (most if energy is not None else 16))
    quick = svd == "randomised" or (svd == "auto" and most >= QUICK_FROM)
    tried = limit if energy is None else min(limit, KEPT)
    while quick and tried <= most // 3:
        A, B, S = factorise_quickly(change, tried, seed=seed)
        rank = _rank(S, energy, whole, limit)
        if rank <= tried or tried == limit:
            return A, B, S, min(rank, tried)
        tried = min(limit, 2 * tried)
    A, B, S = factorise(change, limit)
    return A, B, S, min(_rank(S, energy, whole, limit), limit)


def _rank(S: Tensor, energy: float | None, whole: float, limit: int) -> int:
    """Of experts, whose values are (E, K), that of their common spectrum."""
    if energy is None:
        return limit
    one = S if S.dim() == 1 else S.square().sum(0).sqrt()
    return max(1, rank_of_energy(one, energy, whole))


def _others(new: StoredWeights, old: StoredWeights, taken: set[str]) -> dict[str, float]:
    """The norm of the change of every other weight that changed."""
    found = {}
    for name in new:
        if name in taken or not new.kind(name)[0].is_floating_point:
            continue
        size = float((new.read(name).double() - old.read(name).double()).norm())
        if size:
            found[name] = size
    return found

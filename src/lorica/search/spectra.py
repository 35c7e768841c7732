"""What rank the learned updates really have, and what they score when they are cut to less.

An update of LoRA is s B A. Its singular values say how many directions it uses; cut to the k
largest, it is the best adapter of rank k that lies in the trained one, for the price of an SVD
instead of a training run.

Legend: K the rank that is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.attach.attach import attach_tensors
from lorica.attach.handle import Adapter
from lorica.attach.places import places_of
from lorica.attach.plates import Slot
from lorica.methods.lora import LoRA
from lorica.methods.method import Tensors
from lorica.ops.low_rank import effective_rank, rank_of_energy, singular_values, truncate

ENERGY = 0.9
"""Of the update of a layer that its suggested rank keeps."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the update of one layer.

    Attributes:
        path: of the layer.
        rank: that it trained with.
        values: singular values of s B A, the largest first.
        effective: the exponential of their entropy.
        energy_90, energy_99: the ranks that keep so much of the squared norm.
    """

    path: str
    rank: int
    values: tuple[float, ...]
    effective: float
    energy_90: int
    energy_99: int


def has_spectra(adapter: Adapter) -> bool:
    """Whether the adapter is plain LoRA, whose updates are products that can be cut."""
    slots = [(s.method, s.tensors) for s in adapter.slots.values() if isinstance(s.method, LoRA)]
    grouped = any(
        tensors["B"].dim() > 3 and tensors["B"].shape[1] != method.r for method, tensors in slots
    )
    return type(adapter.method) is LoRA and adapter.on is None and bool(slots) and not grouped


def spectra(adapter: Adapter) -> list[Spectrum]:
    """The spectrum of every layer that LoRA adapts, in the order of the model; of the experts of a
    layer, all together.
    """
    found = []
    for path, slot in adapter.slots.items():
        if isinstance(slot.method, LoRA) and "A" in slot.tensors:
            B, A = _matrices(slot)
            S = singular_values(A, B).flatten().sort(descending=True).values
            found.append(
                Spectrum(
                    path=path,
                    rank=slot.method.r,
                    values=tuple(S.tolist()),
                    effective=effective_rank(S),
                    energy_90=rank_of_energy(S, 0.9),
                    energy_99=rank_of_energy(S, 0.99),
                )
            )
    return found


def suggested(found: Sequence[Spectrum]) -> tuple[int, dict[str, int]]:
    """Settings by which each layer gets the rank that keeps `ENERGY` of its update: `r`, the most
    frequent one, and a `rank_pattern` for the layers that need another.
    """
    needs = {one.path: max(1, one.energy_90) for one in found}
    ranks = list(needs.values())
    usual = max(sorted(set(ranks)), key=ranks.count) if ranks else 1
    return usual, {path: rank for path, rank in needs.items() if rank != usual}


def smaller_ranks(rank: int, wanted: Sequence[int] = ()) -> list[int]:
    """Ranks to cut to: the powers of two below one, and those of others that were trained."""
    powers = [2**power for power in range(max(1, rank).bit_length()) if 2**power < rank]
    return sorted({*powers, *(other for other in wanted if other < rank)})


@torch.no_grad()
def cut(model: nn.Module, adapter: Adapter, rank: int | Mapping[str, int], *, name: str) -> Adapter:
    """A second adapter on the model, with the updates of the first one cut to a smaller rank.

    Args:
        adapter: of plain LoRA; see `has_spectra`.
        rank: K, for all layers or by the path of each.
        name: of the new adapter.
    """
    ranks = {
        path: min(slot.method.r, rank if isinstance(rank, int) else rank.get(path, slot.method.r))
        for path, slot in adapter.slots.items()
        if isinstance(slot.method, LoRA)
    }
    most = max(ranks.values())
    method = replace(
        adapter.method,  # type: ignore[type-var]
        r=most,
        lora_alpha=most,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights="kaiming",
        **_neutral(adapter.method),
    )
    if len(set(ranks.values())) > 1:
        method = replace(method, rank_pattern=ranks, alpha_pattern=ranks)
    places, method, _ = places_of(model, method)
    tensors = {
        path: _cut(slot, ranks[path]) if path in ranks else _copied(slot)
        for path, slot in adapter.slots.items()
    }
    return attach_tensors(model, method, places, tensors, name=name)


def _neutral(method: Any) -> dict[str, object]:
    """Settings of a start, as they are without it."""
    names = ("init_records", "eva_rho", "eva_tau", "lora_ga_gamma", "loftq_iter")
    return {name: method.__dataclass_fields__[name].default for name in names}


def _cut(slot: Slot, rank: int) -> Tensors:
    """The factors of one layer at a smaller rank, in its shapes and with a scale of 1."""
    B, A = _matrices(slot)
    A, B, _ = truncate(A, B, rank)
    missing = rank - A.shape[-2]  # where the layer has fewer features than the rank
    A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    shape_A, shape_B = slot.tensors["A"].shape, slot.tensors["B"].shape
    if A.dim() == 3:  # experts
        return {"A": A, "B": B}
    return {
        "A": A.reshape(rank, *shape_A[1:]).contiguous(),
        "B": B.reshape(shape_B[0], rank, *shape_B[2:]).contiguous(),
    }


def _copied(slot: Slot) -> Tensors:
    return {key: tensor.detach().clone() for key, tensor in slot.tensors.items()}


def _matrices(slot: Slot) -> tuple[Tensor, Tensor]:
    """B (O, R), scaled, and A (R, I) of one layer; of experts a stack of both."""
    method, tensors = slot.method, slot.tensors
    assert isinstance(method, LoRA)
    experts = tensors["A"].dim() == 3 and tensors["B"].dim() == 3
    A, B = method.factors({k: t.detach() for k, t in tensors.items()}, experts=experts)
    if not experts:
        A, B = A.flatten(1), B.flatten(1)
    return B * method.scale, A

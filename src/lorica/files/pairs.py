"""LoRA as what all tools agree on: two factors and a scale at each layer.

Every foreign format of LoRA is written from `pairs_of` and read into `found_of`, so that a format
says names and shapes only. What has no factors there is refused by name, never dropped.

Legend: I in features, O out features, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.layers import describe
from lorica.attach.places import Places
from lorica.errors import AdapterFileError, ConfigError, nearest
from lorica.files.found import Found
from lorica.files.peft_layout import Spot, locate, modules_of
from lorica.files.peft_written import exact_names
from lorica.methods.copy import Copy
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.method import LayerKind, Tensors
from lorica.methods.placed import whole
from lorica.methods.tokens import Tokens

_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Pair:
    """LoRA at one layer: its weight changes by `alpha / R * B A`.

    Attributes:
        A: (R, I), convolution (R, I, *kernel), embedding (R, vocabulary).
        B: (O, R), convolution (O, R, 1, 1), embedding (width, R).
        alpha: the scale times the rank.
        m: DoRA's lengths (O,); None of plain LoRA.
    """

    A: Tensor
    B: Tensor
    alpha: float
    m: Tensor | None = None

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def with_alpha(self, alpha: float) -> Pair:
        """The same update with another alpha; the rest of the scale goes into B."""
        if alpha == self.alpha:
            return self
        return Pair(self.A, self.B * (self.alpha / alpha), alpha, self.m)


def pairs_of(
    adapter: Adapter,
    format: str,
    *,
    kinds: tuple[LayerKind, ...] = ("linear",),
    dora: bool = False,
) -> dict[str, Pair]:
    """The factors of an adapter by the path of the layer, on the CPU.

    Args:
        format: named in errors.
        kinds: the kinds of layers that the format holds.
        dora: whether it holds DoRA's lengths.

    Raises:
        AdapterFileError: the adapter has something that the format cannot hold; all of it at once.
    """
    modules = modules_of(adapter.model)
    found: dict[str, Pair] = {}
    problems = []
    if adapter.on is not None:
        problems.append(f"it lies on another adapter ({adapter.on.method.kind}), which acts too")
    for path, slot in adapter.slots.items():
        own = slot.method
        if why := _unheld(path, own, modules, kinds, dora):
            problems.append(f"{path}: {why}")
            continue
        assert isinstance(own, LoRA)
        held = {name: tensor.detach().cpu() for name, tensor in slot.tensors.items()}
        A, B = own.factors(held)
        found[path] = Pair(A, B, own.scale * A.shape[0], held.get("m"))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
        raise AdapterFileError(
            f"{format} cannot hold this {adapter.method.kind} adapter",
            problems=problems[:_SHOWN] + more,
            mend="merge it into its base and give that (lorica merge), or write it with --format "
            "lorica",
        )
    return found


def _unheld(
    path: str,
    own: object,
    modules: Mapping[str, nn.Module],
    kinds: tuple[LayerKind, ...],
    dora: bool,
) -> str | None:
    """Why a format cannot hold what sits at a place."""
    if isinstance(own, Copy):
        return "trained whole; the format holds factors only"
    if isinstance(own, Tokens):
        return "rows of single tokens; the format holds factors only"
    if not isinstance(own, LoRA):
        return f"{getattr(own, 'kind', '')} is no product of two factors"
    if isinstance(own, DoRA) and not dora:
        return "it has no place for DoRA's lengths"
    if path not in modules:
        return "a bare parameter; the format names layers"
    kind = describe(modules[path]).kind
    if kind not in kinds:
        return f"a layer of kind {kind}; it holds {', '.join(kinds)}"
    return None


def uniform(pairs: Mapping[str, Pair], scale: float, r: int | None = None) -> dict[str, Pair]:
    """The same updates with one scale everywhere, and one rank where it is given.

    The rest of the scale goes into B, and missing ranks are zeros.
    """
    return {path: _uniform(pair, scale, r or pair.r) for path, pair in pairs.items()}


def _uniform(pair: Pair, scale: float, r: int) -> Pair:
    A, B = pair.A, pair.B if pair.scale == scale else pair.B * (pair.scale / scale)
    if (missing := r - pair.r) > 0:
        A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing, *B.shape[2:])], 1)
    return Pair(A, B, scale * r, pair.m)


def commonest_scale(pairs: Mapping[str, Pair]) -> float:
    """The scale that most layers have; the larger of several."""
    counts = Counter(pair.scale for pair in pairs.values())
    return max(counts, key=lambda scale: (counts[scale], scale))


# --- reading --------------------------------------------------------------------------------------


def found_of(
    model: nn.Module, pairs: Mapping[str, Pair], where: str | Path, *, base_name: str | None = None
) -> Found:
    """An adapter of these factors, checked against the layers of `model`.

    Raises:
        AdapterFileError: a path is no layer of this model, or a shape is not its; all at once.
    """
    modules, problems = modules_of(model), list[str]()
    spots: dict[str, Spot] = {}
    for path, pair in pairs.items():
        spot = locate(modules, path)
        if isinstance(spot, str):
            near = nearest(path, modules) if path not in modules else None
            problems.append(f"{path}: {spot}" + (f"; there is {near}" if near else ""))
        elif wrong := _misfit(spot, pair):
            problems.append(f"{path}: {wrong}")
        else:
            spots[path] = spot
    lengths = {pair.m is not None for pair in pairs.values()}
    if len(lengths) > 1:
        problems.append("some layers have DoRA's lengths and some have none")
    if problems or not pairs:
        more = [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
        raise AdapterFileError(
            f"{where} does not fit this {type(model).__name__}",
            problems=[*problems[:_SHOWN], *more] or ["it holds no factors"],
            mend="load the base that the adapter was made for",
        )
    method = _settings(DoRA if lengths == {True} else LoRA, pairs, modules, where)
    order = {path: i for i, path in enumerate(modules)}
    places: Places = {}
    tensors: dict[str, Tensors] = {}
    for path in sorted(pairs, key=order.__getitem__):
        spot, pair = spots[path], pairs[path]
        own = replace(
            method, r=pair.r, lora_alpha=whole(pair.alpha), rank_pattern={}, alpha_pattern={}
        )
        places[spot.path] = modules[spot.core], spot.parameter, own
        m = None if pair.m is None else pair.m.float()
        tensors[spot.path] = spot.from_file(pair.A.float(), pair.B.float(), m)
    return Found(method, places, tensors, base_name)


def _misfit(spot: Spot, pair: Pair) -> str | None:
    """What is wrong with the shapes of a pair at a layer."""
    shapes = tuple(pair.A.shape), tuple(pair.B.shape)
    if pair.A.dim() == 0 or shapes != spot.shapes(pair.A.shape[0]):
        want_A, want_B = spot.shapes(pair.A.shape[0] if pair.A.dim() else 1)
        return f"A {shapes[0]} and B {shapes[1]}, but the base needs {want_A} and {want_B}"
    if pair.m is not None and pair.m.numel() != spot.layer.out_features:
        return f"{pair.m.numel()} lengths for {spot.layer.out_features} outputs"
    return None


def _settings(
    kind: type[LoRA],
    pairs: Mapping[str, Pair],
    modules: Mapping[str, nn.Module],
    where: str | Path,
) -> LoRA:
    """The settings of the whole adapter: what most layers have, and patterns for the others."""
    ranks = {path: pair.r for path, pair in pairs.items()}
    alphas = {path: whole(pair.alpha) for path, pair in pairs.items()}
    names, excluded = exact_names(pairs, modules)
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    try:
        return kind(
            r=r,
            lora_alpha=alpha,
            target_modules=tuple(names),
            exclude_modules=tuple(excluded),
            rank_pattern=_pattern(ranks, r),
            alpha_pattern=_pattern(alphas, alpha),
        )
    except ConfigError as error:
        raise AdapterFileError(f"{where} cannot be used", problems=error.problems) from error


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Endings of paths -> their value, where it is not the usual one."""
    found: dict[str, Any] = {}
    for value in {v for v in values.values() if v != usual}:
        names, _ = exact_names((path for path, v in values.items() if v == value), values)
        found |= dict.fromkeys(names, value)
    return dict(sorted(found.items()))

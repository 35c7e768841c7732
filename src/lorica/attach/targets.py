"""From what the user names to the places of a model that an adapter takes.

Every name must find something, and what cannot carry an adapter is refused by name; all problems of
one call are in one error. See `resolve` for what can be named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import nn

from lorica.attach.choices import CHOICES, Picked, choose
from lorica.attach.families import synonym
from lorica.attach.survey import (
    SUPPORTED,
    SUPPORTED_NAMES,
    Place,
    Survey,
    ends,
    layer_number,
    suffix_of,
    survey,
    unwrap,
)
from lorica.errors import ConfigError, TargetError, nearest
from lorica.methods.patterns import Pattern, compiled, pattern_value, unmatched_patterns

__all__ = ["CHOICES", "Targets", "pattern_value", "resolve", "unmatched_patterns", "unwrap"]

_SPAN = re.compile(r"([0-9]{1,6})(?: *- *([0-9]{1,6}))?")


@dataclass(frozen=True, eq=False)
class Targets:
    """The places that an adapter takes.

    Attributes:
        modules: layers by path, in the order of the model, every object once.
        parameters: weights without a layer of their own by path: the module that holds them and
            their name in it. 3-D expert weights, packed projections of `nn.MultiheadAttention`,
            and bare parameters (a router's) that were named.
        reason: what was chosen and why, for the user to read.
        left_out: path -> why, for what a choice or a pattern passed by.
        shared: path of a target -> other modules that hold the same Parameter. Merging into one
            changes them all.
        also: path of a target -> its further names in the model.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, tuple[nn.Module, str]]
    reason: str
    left_out: dict[str, str] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)
    also: dict[str, list[str]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Modules, then parameters."""
        return [*self.modules, *self.parameters]


def resolve(
    model: nn.Module,
    *,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | str | Collection[int] | None = None,
) -> Targets:
    """Find the places of `model` that the settings name.

    Args:
        model: any module, also on the meta device. `torch.compile`d models are unwrapped.
        target_modules: None or "auto": the default of the model's family, or for an unknown model
            what its structure suggests; "all-linear": every linear layer and expert weight but
            heads and routers; "attention", "mlp": that part of every block; or names, each of which
            is a path, the end of one after a dot, or a pattern (see `methods.patterns`).
        exclude_modules: names or patterns to leave out; a container takes what it holds with it.
        layers_to_transform: numbers of the blocks to keep: 3, [0, 3] or "0-3,7". The number of a
            layer is the first one in its path. Layers outside the blocks are then left out.

    Raises:
        TargetError: a name or an exclusion matches nothing, a named module cannot carry an adapter,
            a block does not exist, nothing is left; all of it at once, with what does exist.
    """
    found = survey(model)
    picked = Picked()
    word = "auto" if target_modules is None else target_modules
    if isinstance(word, str) and word.lower() in CHOICES:
        choose(found, word.lower(), picked)
    else:
        _pick_named(found, word, picked)
    _exclude(found, _patterns(exclude_modules, picked), picked)
    _keep_layers(found, layers_to_transform, picked)
    if not picked.problems and not picked.places:
        picked.problems.append(f"nothing is left to adapt ({picked.reason})")
    if picked.problems:
        raise TargetError(
            "the target modules cannot be used as given",
            problems=picked.problems,
            expected=_existing(found),
            mend="`lorica inspect MODEL` lists every layer and what each choice would train",
        )
    return _targets(found, picked)


def _targets(found: Survey, picked: Picked) -> Targets:
    order = [p for p in (*found.places.values(), *found.bare.values()) if p.path in picked.places]
    return Targets(
        modules={p.path: p.module for p in order if p.parameter is None},
        parameters={p.path: (p.module, p.parameter) for p in order if p.parameter is not None},
        reason=picked.reason,
        left_out=picked.left_out,
        shared={p.path: list(p.shared) for p in order if p.shared},
        also={p.path: list(p.also) for p in order if p.also},
    )


def _patterns(names: str | Collection[str] | None, picked: Picked) -> list[Pattern]:
    """The names, compiled; those that cannot be are problems."""
    listed = [names] if isinstance(names, str) else list(names or ())
    found = []
    for name in sorted(listed) if isinstance(names, set | frozenset) else listed:
        try:
            found.append(compiled(name))
        except ConfigError as error:
            picked.problems.append("; ".join(filter(None, (error.what, error.expected))))
        except TypeError:  # not even hashable
            picked.problems.append(f"{name!r} is not a name")
    return found


# --- names ---------------------------------------------------------------------------------------


def _pick_named(found: Survey, names: str | Collection[str], picked: Picked) -> None:
    if not names:
        picked.problems.append("the list of target modules is empty")
    counts: dict[str, int] = {}
    for pattern in _patterns(names, picked):
        pick = _pick_name if pattern.spelling == "name" else _pick_pattern
        places = pick(found, pattern, picked)
        counts[pattern.text] = len(places)
        picked.places |= {place.path: place for place in places}
    picked.reason = "as named: " + ", ".join(f"{name} ({n})" for name, n in counts.items())


def _pick_name(found: Survey, pattern: Pattern, picked: Picked) -> list[Place]:
    """The places of one plain name. Whatever else bears the name is a problem."""
    name = pattern.text
    places = _matching(found.places.values(), pattern)
    places = places or _matching(found.bare.values(), pattern)
    refused = [place for place in places if place.refusal]
    picked.problems += [f"{name!r}: {p.path} cannot be adapted: {p.refusal}" for p in refused[:1]]
    taken = {id(place.module) for place in places}
    for path, module in found.modules.items():
        if path and pattern.matches(path) and id(module) not in taken:
            inside = [p for p in found.places.values() if p.path.startswith(f"{path}.")]
            own = [p for p in inside if p.module is module and p.kind == "experts"]
            if own:
                places += own
            else:
                bare = [p for p in found.bare.values() if p.module is module]
                picked.problems.append(_unfit(name, path, module, inside, bare))
                break
    if not places and not any(pattern.matches(path) for path in found.modules):
        picked.problems.append(_unmatched(name, found))
    return places


def _pick_pattern(found: Survey, pattern: Pattern, picked: Picked) -> list[Place]:
    """The places of one pattern; containers and other layers that it also matches are passed by."""
    places = _matching(found.places.values(), pattern)
    places = places or _matching(found.bare.values(), pattern)
    picked.left_out |= {place.path: place.refusal for place in places if place.refusal}
    places = [place for place in places if not place.refusal]
    if places:
        return places
    others = [path for path in found.modules if path and pattern.matches(path)]
    if others:
        first = others[0]
        picked.problems.append(
            f"the pattern {pattern.text!r} matches {len(others)} modules, but none that can carry "
            f"an adapter, for example {first} ({type(found.modules[first]).__name__})"
        )
    else:
        picked.problems.append(f"the pattern {pattern.text!r} matches nothing")
    return []


def _matching(places: Iterable[Place], pattern: Pattern) -> list[Place]:
    return [p for p in places if any(pattern.matches(path) for path in (p.path, *p.also))]


def _unfit(name: str, path: str, module: nn.Module, inside: list[Place], bare: list[Place]) -> str:
    """Why a module that bears the name is no target, and what could be named in its place."""
    kind = type(module).__name__
    if inside:
        children = ", ".join(list(Counter(suffix_of(p.path) for p in inside))[:8])
        return f"{name!r} is a container ({path}, {kind}); it holds: {children}"
    hint = f"; its parameter can be named: {suffix_of(bare[0].path)!r}" if bare else ""
    return (
        f"{name!r}: {path} is a {kind}, which cannot carry an adapter; {SUPPORTED_NAMES} can{hint}"
    )


def _unmatched(name: str, found: Survey) -> str:
    """Why a name finds nothing, with the nearest one that would."""
    owner, _, last = name.rpartition(".")
    if last in ("weight", "bias") and owner:
        near = [p for p, m in found.modules.items() if ends(p, owner) and isinstance(m, SUPPORTED)]
        if near:
            return f"{name!r} is a parameter: name the layer, {owner!r}"
    known = found.suffixes()
    near = synonym(last, set(known)) or nearest(name, known)
    near = near or nearest(name, {path.rpartition(".")[2] for path in found.modules})
    hint = f"; did you mean {near!r}?" if near else ""
    if "," in name:
        hint = "; several names are given as a list"
    return f"{name!r} matches nothing{hint}"


# --- less ----------------------------------------------------------------------------------------


def _exclude(found: Survey, patterns: list[Pattern], picked: Picked) -> None:
    every = (*found.places.values(), *found.bare.values())
    for pattern in patterns:
        holders = tuple(f"{path}." for path in found.modules if path and pattern.matches(path))
        hits = _matching(every, pattern)
        hits += [place for place in every if place.path.startswith(holders)]
        if not hits:
            named = pattern.spelling == "name"
            fault = (
                _unmatched(pattern.text, found) if named else f"{pattern.text!r} matches nothing"
            )
            picked.problems.append(f"exclude_modules: {fault}")
        elif not picked.problems and not _touches(hits, picked):
            picked.problems.append(f"exclude_modules: {pattern.text!r} matches none of the targets")
        for place in hits:
            picked.drop(place.path, f"excluded by {pattern.text!r}")
    if patterns and not picked.problems:
        picked.reason += f"; {len(picked.places)} after exclude_modules"


def _touches(hits: list[Place], picked: Picked) -> bool:
    """Whether an exclusion names anything that was chosen, or that a choice had left out anyway."""
    return any(place.path in picked.places or place.path in picked.left_out for place in hits)


def _keep_layers(found: Survey, layers: int | str | Collection[int] | None, picked: Picked) -> None:
    if layers is None:
        return
    spans = _spans(layers, picked)
    numbers = {layer_number(path) for path in picked.places} - {None}
    lists = {stack_of(path) for path in picked.places if layer_number(path) is not None}
    exist = {
        n
        for path in found.modules
        if (n := layer_number(path)) is not None and stack_of(path) in lists
    }
    if picked.places and not exist:
        picked.problems.append(
            "layers_to_transform: none of the chosen layers lies in a numbered block"
        )
        return
    for text, span in spans.items() if exist else ():
        if missing := sorted(set(span) - exist):
            picked.problems.append(
                f"layers_to_transform: {text} asks for block {missing[0]}, but there are "
                f"{min(exist)} to {max(exist)}"
            )
        elif not numbers & set(span):
            picked.problems.append(f"layers_to_transform: {text} holds none of the chosen layers")
    kept = {number for span in spans.values() for number in span}
    for path, place in list(picked.places.items()):
        if place.layer not in kept:
            picked.drop(path, "not in layers_to_transform")
    if not picked.problems:
        picked.reason += f"; {len(picked.places)} in the blocks {', '.join(spans)}"


def stack_of(path: str) -> str:
    """The part of a path in front of its first number: the name of a stack of layers."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[0]


def _spans(layers: int | str | Collection[int], picked: Picked) -> dict[str, range]:
    """What was asked for, piece by piece: "0-3,7" -> {"0-3": range(0, 4), "7": range(7, 8)}."""
    if isinstance(layers, str):
        pieces = [piece.strip() for piece in layers.split(",")]
    else:
        pieces = [layers] if isinstance(layers, int) else list(layers)
    spans: dict[str, range] = {}
    for piece in pieces:
        found = _SPAN.fullmatch(str(piece))
        if isinstance(piece, bool) or not found:
            fault = "is neither a number nor a range"
        else:
            span = range(int(found[1]), int(found[2] or found[1]) + 1)
            fault = "" if span else "is empty"
            spans |= {str(piece): span} if span else {}
        if fault:
            picked.problems.append(f"layers_to_transform: {piece!r} {fault}")
    if not pieces:
        picked.problems.append("layers_to_transform is empty")
    return spans


def spans(layers: int | str | Collection[int] | None) -> tuple[set[int], list[str]]:
    """The numbers that layers_to_transform asks for, and what is wrong with it."""
    picked = Picked()
    found = _spans(layers if layers is not None else (), picked)
    return {number for span in found.values() for number in span}, picked.problems


def _existing(found: Survey, most: int = 40) -> str:
    """The names that could have been given, with how often each occurs."""
    counts = found.suffixes()
    shown = [f"{name} x{n}" if n > 1 else name for name, n in counts.most_common(most)]
    more = f" and {len(counts) - most} more" if len(counts) > most else ""
    return f"one of {', '.join(CHOICES)}; or of these names: {', '.join(shown) or 'none'}{more}"

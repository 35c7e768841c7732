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

from lorica.attach.families import FAMILIES, synonym
from lorica.attach.survey import (
    SUPPORTED,
    SUPPORTED_NAMES,
    Place,
    Role,
    Survey,
    layer_number,
    suffix_of,
    survey,
    unwrap,
)
from lorica.errors import ConfigError, TargetError, nearest
from lorica.methods.patterns import Pattern, compiled, pattern_value, unmatched_patterns

__all__ = ["CHOICES", "Targets", "pattern_value", "resolve", "unmatched_patterns", "unwrap"]

CHOICES = ("auto", "all-linear", "attention", "mlp")
"""The words that stand for a choice of layers."""

_WHY_ALL = (
    "LoRA on every linear layer of the blocks matches full fine-tuning where attention alone does "
    "not (QLoRA, arXiv 2305.14314, section 4)"
)
_WHY_NOT: dict[Role, str] = {
    "attention": "attention",
    "mlp": "feed-forward layer",
    "mixer": "state-space or recurrent layer",
    "experts": "routed expert: many weights that see few tokens each; all-linear takes it",
    "embedding": "embedding: name it to adapt it",
    "convolution": "convolution: name it to adapt it",
    "outside": "outside the repeated blocks",
    "head": "head or pooler: train it whole (modules_to_save) or name it",
    "router": "router or indexer: it chooses, rather than computes; name it to adapt it",
}


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
    picked = _Picked()
    _pick(found, target_modules, picked)
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


@dataclass(eq=False)
class _Picked:
    """What is chosen so far, and what is wrong so far."""

    places: dict[str, Place] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reason: str = ""

    def drop(self, path: str, why: str) -> None:
        if self.places.pop(path, None) is not None:
            self.left_out[path] = why


def _targets(found: Survey, picked: _Picked) -> Targets:
    order = [p for p in (*found.places.values(), *found.bare.values()) if p.path in picked.places]
    return Targets(
        modules={p.path: p.module for p in order if p.parameter is None},
        parameters={p.path: (p.module, p.parameter) for p in order if p.parameter is not None},
        reason=picked.reason,
        left_out=picked.left_out,
        shared={p.path: list(p.shared) for p in order if p.shared},
        also={p.path: list(p.also) for p in order if p.also},
    )


def _patterns(names: str | Collection[str] | None, picked: _Picked) -> list[Pattern]:
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


# --- choices -------------------------------------------------------------------------------------


def _pick(found: Survey, names: str | Collection[str] | None, picked: _Picked) -> None:
    word = "auto" if names is None else names.lower() if isinstance(names, str) else None
    if word == "auto":
        _pick_auto(found, picked)
    elif word == "all-linear":
        roles = {"attention", "mlp", "mixer", "experts", "outside"}
        _take(found, picked, roles, ("linear", "packed", "experts"))
        picked.reason = _count("all-linear: every linear layer but heads and routers", picked)
    elif word in ("attention", "mlp"):
        roles = {"attention"} if word == "attention" else {"mlp", "experts"}
        _take(found, picked, roles, ("linear", "packed", "experts"))
        picked.reason = _count(f"{word}: the {word} layers of every block", picked)
        if not picked.places:
            there = Counter(p.role for p in found.places.values() if p.kind == "linear")
            roles_there = ", ".join(f"{role} ({n})" for role, n in there.items()) or "none"
            picked.problems.append(
                f"{word!r}: this model has no such layers; its linear layers are: {roles_there}"
            )
    else:
        _pick_named(found, names or (), picked)


def _take(found: Survey, picked: _Picked, roles: set[str], kinds: tuple[str, ...]) -> None:
    for path, place in found.places.items():
        if place.role in roles and place.kind in kinds and not place.refusal:
            picked.places[path] = place
        else:
            picked.left_out[path] = place.refusal or _WHY_NOT[place.role]
    picked.left_out |= {p: _WHY_NOT["router"] for p, b in found.bare.items() if b.role == "router"}


def _pick_auto(found: Survey, picked: _Picked) -> None:
    """The table for known families; for others the linear layers of the blocks, or everything."""
    _take(found, picked, {"attention", "mlp", "mixer"}, ("linear", "packed"))
    where = ""
    if any("language_model" in path.split(".") for path in picked.places):
        where = " of the language model"
        for path in [p for p in picked.places if "language_model" not in p.split(".")]:
            picked.drop(path, "another tower than the language model: name it to adapt it")
    if not any(p.role in ("attention", "mixer") for p in picked.places.values()):
        _pick_structure(found, picked)
        return
    family = FAMILIES.get(found.model_type or "", ())
    names = [next((n for n in family if _ends(path, n)), None) for path in picked.places]
    if any(names):
        for path, name in zip(list(picked.places), names, strict=True):
            if name is None:
                picked.drop(path, f"not among the default layers of {found.model_type}")
        layers = [name for name in family if name in names]
        text = f"auto: the defaults of {found.model_type}{where}"
    else:
        layers = list(Counter(suffix_of(path) for path in picked.places))
        kind = (
            f"{found.model_type!r} is not a known family" if found.model_type else "no known family"
        )
        text = f"auto: {kind}, so the linear layers of attention, feed-forward and mixers{where}"
    picked.reason = _count(f"{text}: {', '.join(layers)}", picked)
    if any(p.role == "experts" for p in found.places.values()):
        picked.reason += ". Routed experts are left out: all-linear takes them too"
    else:
        picked.reason += f". {_WHY_ALL}"


def _pick_structure(found: Survey, picked: _Picked) -> None:
    """A model without attention: all linear layers and plain convolutions but heads."""
    for path, place in found.places.items():
        fits = place.kind == "linear" or place.kind == "convolution"
        if fits and place.role in ("mlp", "outside", "convolution") and not place.refusal:
            if getattr(place.module, "groups", 1) == 1:
                picked.places[path] = place
                picked.left_out.pop(path, None)
            else:
                picked.left_out[path] = "grouped convolution: name it to adapt it"
    picked.reason = _count(
        f"auto: {found.model_type or 'this model'} has no attention blocks, so every linear layer "
        "and plain convolution but heads",
        picked,
    )


def _count(text: str, picked: _Picked) -> str:
    return f"{text} ({len(picked.places)} places)"


# --- names ---------------------------------------------------------------------------------------


def _pick_named(found: Survey, names: str | Collection[str], picked: _Picked) -> None:
    if not names:
        picked.problems.append("the list of target modules is empty")
    counts: dict[str, int] = {}
    for pattern in _patterns(names, picked):
        pick = _pick_name if pattern.spelling == "name" else _pick_pattern
        places = pick(found, pattern, picked)
        counts[pattern.text] = len(places)
        picked.places |= {place.path: place for place in places}
    picked.reason = "as named: " + ", ".join(f"{name} ({n})" for name, n in counts.items())


def _pick_name(found: Survey, pattern: Pattern, picked: _Picked) -> list[Place]:
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
                picked.problems.append(_unfit(name, path, module, inside))
                break
    if not places and not any(pattern.matches(path) for path in found.modules):
        picked.problems.append(_unmatched(name, found))
    return places


def _pick_pattern(found: Survey, pattern: Pattern, picked: _Picked) -> list[Place]:
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


def _unfit(name: str, path: str, module: nn.Module, inside: list[Place]) -> str:
    kind = type(module).__name__
    if inside:
        children = ", ".join(list(Counter(suffix_of(p.path) for p in inside))[:8])
        return f"{name!r} is a container ({path}, {kind}); it holds: {children}"
    return f"{name!r}: {path} is a {kind}, which cannot carry an adapter; {SUPPORTED_NAMES} can"


def _unmatched(name: str, found: Survey) -> str:
    """Why a name finds nothing, with the nearest one that would."""
    owner, _, last = name.rpartition(".")
    if last in ("weight", "bias") and owner:
        near = [p for p, m in found.modules.items() if _ends(p, owner) and isinstance(m, SUPPORTED)]
        if near:
            return f"{name!r} is a parameter: name the layer, {owner!r}"
    known = found.suffixes()
    near = synonym(last, set(known)) or nearest(name, known)
    near = near or nearest(name, {path.rpartition(".")[2] for path in found.modules})
    hint = f"; did you mean {near!r}?" if near else ""
    if "," in name:
        hint = "; several names are given as a list"
    return f"{name!r} matches nothing{hint}"


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


# --- less ----------------------------------------------------------------------------------------


def _exclude(found: Survey, patterns: list[Pattern], picked: _Picked) -> None:
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


def _touches(hits: list[Place], picked: _Picked) -> bool:
    """Whether an exclusion names anything that was chosen, or that a choice had left out anyway."""
    return any(place.path in picked.places or place.path in picked.left_out for place in hits)


def _keep_layers(
    found: Survey, layers: int | str | Collection[int] | None, picked: _Picked
) -> None:
    if layers is None:
        return
    spans = _spans(layers, picked)
    numbers = {layer_number(path) for path in picked.places} - {None}
    lists = {_list_of(path) for path in picked.places if layer_number(path) is not None}
    exist = {
        n
        for path in found.modules
        if (n := layer_number(path)) is not None and _list_of(path) in lists
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


def _list_of(path: str) -> str:
    """The part of a path in front of its first number."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[0]


def _spans(layers: int | str | Collection[int], picked: _Picked) -> dict[str, range]:
    """What was asked for, piece by piece: "0-3,7" -> {"0-3": range(0, 4), "7": range(7, 8)}."""
    if isinstance(layers, str):
        pieces = [piece.strip() for piece in layers.split(",")]
    else:
        pieces = [layers] if isinstance(layers, int) else list(layers)
    spans: dict[str, range] = {}
    for piece in pieces:
        low, dash, high = (piece if isinstance(piece, str) else str(piece)).partition("-")
        if (
            isinstance(piece, bool)
            or not low.strip().isdigit()
            or (dash and not high.strip().isdigit())
        ):
            picked.problems.append(
                f"layers_to_transform: {piece!r} is neither a number nor a range"
            )
        elif not (span := range(int(low), int(high or low) + 1)) or span.stop > 100_000:
            picked.problems.append(f"layers_to_transform: {piece!r} is empty or too long")
        else:
            spans[str(piece)] = span
    if not pieces:
        picked.problems.append("layers_to_transform is empty")
    return spans


def _existing(found: Survey, most: int = 40) -> str:
    """The names that could have been given, with how often each occurs."""
    counts = found.suffixes()
    shown = [f"{name} x{n}" if n > 1 else name for name, n in counts.most_common(most)]
    more = f" and {len(counts) - most} more" if len(counts) > most else ""
    return f"one of {', '.join(CHOICES)}; or of these names: {', '.join(shown) or 'none'}{more}"

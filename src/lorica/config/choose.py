"""Which method a run has, or which train together, by what was given for `method`.

A word names one. Several train as one adapter: a list of words, or of mappings with a word and
settings, {method: parallel, reduction_factor: 2}. Settings beside the list go to every method of it
that has them; those in a mapping to that one alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorica.config.names import ALIASES
from lorica.config.settings import Preset, RunConfig, Union, known_settings, method_settings
from lorica.config.text import yaml_text
from lorica.config.words import shown
from lorica.errors import nearest

Found = dict[str, tuple[Any, str]]
"""Name -> (value, origin)."""
Methods = Mapping[str, type | Preset | Union]


@dataclass
class Part:
    """One method of a run: its settings class, and what was given for it."""

    kind: Any
    given: Found = field(default_factory=dict)


def choose(found: Found, methods: Methods, problems: list[str]) -> list[Part]:
    """The methods of a run, the topmost last. What was given for them is taken out of `found`.

    Empty without methods to choose from, and where `problems` is told why there is none.
    """
    if not methods:
        return []
    word, origin = found.get("method", (RunConfig.model_fields["method"].default, "default"))
    if isinstance(word, list | tuple) or isinstance(_known(word, methods), Union):
        parts = _several(word, origin, found, methods, problems)
        kinds = " and ".join(part.kind.kind for part in parts)
    else:
        kind = _one(word, found, methods, problems)
        parts = [Part(kind)] if kind else []
        kinds = kind.kind if kind else ""
    own = known_settings()
    for key in [key for key in found if key not in own]:
        value, where = found.pop(key)
        taken = [part for part in parts if key in _names(part.kind)]
        for part in taken:
            part.given.setdefault(key, (value, where))
        if parts and not taken:  # without one, the method itself is the problem
            problems.append(f"{where}: {key} has no effect with the method {kinds}")
    return parts


def _known(word: object, methods: Methods) -> Any:
    return methods.get(word) if isinstance(word, str) else None


def _names(kind: Any) -> set[str]:
    return {setting.key for setting in method_settings(kind.kind, kind)}


def _one(word: object, found: Found, methods: Methods, problems: list[str]) -> Any:
    """The settings class that a word names; what it stands for goes into `found`."""
    origin = found.get("method", (word, "default"))[1]
    if isinstance(word, Mapping):
        del found["method"]  # told here, in full
        lines = "; ".join(f"{key}: {yaml_text(value)}" for key, value in word.items())
        problems.append(
            f"{origin}: method is a section here, but settings lie flat: write method: "
            f"{next(iter(methods))}, and at the top level {lines}"
        )
        return None
    chosen = _known(word, methods)
    if chosen is None:
        problems.append(f"{origin}: {_no_method(word, methods)}")
        return None
    if isinstance(chosen, Preset):
        kind = _unfold(str(word), chosen, found, origin, problems)
        found["method"] = kind.kind, f"{origin}, method: {word}"
        return kind
    _propose(str(word), getattr(chosen, "proposes", {}), found, origin)
    return chosen


def _no_method(word: object, methods: Methods) -> str:
    near = nearest(str(word), methods)
    hint = f"did you mean {near}?" if near else f"there are: {', '.join(methods)}"
    return f"method is {shown(word) if not isinstance(word, str) else repr(word)}; {hint}"


def _unfold(word: str, preset: Preset, found: Found, origin: str, problems: list[str]) -> Any:
    """Put what a name stands for in its place; what was given besides must not contradict it."""
    for key, value in preset.values.items():
        given, where = found.get(key, (value, ""))
        if given != value and key != "loraplus_lr_ratio":  # which is how much, not whether
            problems.append(f"{where}: {key}={given} contradicts method={word}: {key}={value}")
        found.setdefault(key, (value, f"{origin}, method: {word}"))
    _propose(word, preset.proposes, found, origin)
    kind: Any = preset.method
    _propose(word, getattr(kind, "proposes", {}), found, origin)
    return kind


def _propose(word: str, proposes: Mapping[str, Any], found: Found, origin: str) -> None:
    """Settings that a method asks for, where others are not given."""
    for key, value in proposes.items():
        if key != "epochs" or "max_steps" not in found:  # the first to be reached would end the run
            found.setdefault(key, (value, f"{origin}, method: {word}"))


def _several(
    word: Any, origin: str, found: Found, methods: Methods, problems: list[str]
) -> list[Part]:
    """The methods of a list, or of a name that stands for one."""
    union = _known(word, methods)
    items = [{"method": name, **values} for name, values in union.parts] if union else list(word)
    parts = []
    for number, item in enumerate(items, 1):
        where = f"{origin}, method: {word}" if union else f"{origin}, method {number} of the list"
        part = _part(item, where, found, methods, problems, flat_wins=union is not None)
        parts += [part] if part else []
    if len(items) < 2:
        only = f"write method: {items[0]}" if items and isinstance(items[0], str) else "name more"
        problems.append(f"{origin}: method is a list of {len(items)}; {only}")
    for part in parts:  # a name may stand for settings of training as well
        for key in [key for key in part.given if key in known_settings()]:
            found.setdefault(key, part.given.pop(key))
    return parts if len(parts) == len(items) else []


def _part(
    item: Any, where: str, found: Found, methods: Methods, problems: list[str], *, flat_wins: bool
) -> Part | None:
    """One method of a list, with its own settings and those beside the list that it has."""
    values = dict(item) if isinstance(item, Mapping) else {"method": item}
    word = values.pop("method", None)
    chosen = _known(word, methods)
    if chosen is None or isinstance(chosen, Union):
        what = "a mapping without `method`" if word is None else _no_method(word, methods)
        if chosen is not None:
            what = f"method is {word!r}, which is several: name its parts"
        problems.append(f"{where}: {what}")
        return None
    kind = chosen.method if isinstance(chosen, Preset) else chosen
    names = _names(kind)
    values = {ALIASES.get(key, key): value for key, value in values.items()}
    own: Found = {key: (value, where) for key, value in values.items()}
    unknown = [key for key in own if key not in names]
    problems += [f"{where}: {key} has no effect with the method {kind.kind}" for key in unknown]
    flat = {key: pair for key, pair in found.items() if key in names}
    given = {**own, **flat} if flat_wins else {**flat, **own}
    if isinstance(chosen, Preset):
        _unfold(str(word), chosen, given, where, problems)
    else:
        _propose(str(word), getattr(chosen, "proposes", {}), given, where)
    return Part(kind, given)

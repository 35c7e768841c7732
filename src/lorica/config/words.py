"""Types in words: what a setting takes, what is wrong with a value, how it was probably meant.

What is expected is worked out from the type and the range that are checked, so that no message can
name another range.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import annotated_types

from lorica.config.names import SECRET_VALUE
from lorica.errors import nearest


@dataclass(frozen=True)
class Expects:
    """Put in an annotation: what is expected, in words that the type alone does not give."""

    text: str


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, with `Annotated` taken off; of anything else, itself."""
    if typing.get_origin(annotation) is Annotated:
        return members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for part in typing.get_args(annotation) for inner in members(part))
    return (annotation,)


def is_list(member: Any) -> bool:
    """Whether one alternative of a type is a list of things."""
    kind = typing.get_origin(member) or member
    return isinstance(kind, type) and issubclass(kind, Sequence) and not issubclass(kind, str)


def is_mapping(member: Any) -> bool:
    """Whether one alternative of a type is a mapping."""
    kind = typing.get_origin(member) or member
    return isinstance(kind, type) and issubclass(kind, Mapping)


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type takes, in words, with the range that its metadata sets."""
    for item in metadata:
        if isinstance(item, Expects):
            return item.text
    if typing.get_origin(annotation) is Annotated:
        inner, *more = typing.get_args(annotation)
        return describe(inner, [*more, *metadata])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        parts = [describe(part, metadata) for part in typing.get_args(annotation)]
        *first, last = dict.fromkeys(parts)
        return f"{', '.join(first)} or {last}" if first else last
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(metadata)
    if typing.get_origin(annotation) is Literal:
        choices = [str(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if is_mapping(annotation):
        return "a mapping {name: value}"
    if is_list(annotation):
        inner = (*typing.get_args(annotation), str)[0]
        return f"a list of {_PLURALS.get(members(inner)[0], 'values')}"
    return {bool: "true or false", str: "a text", type(None): "null"}.get(
        annotation, str(annotation)
    )


_PLURALS = {str: "texts", int: "whole numbers", float: "numbers", bool: "true or false"}


def _range(metadata: Sequence[Any]) -> str:
    bounds = {type(item): item for item in metadata if type(item) in _BOUNDS}
    if set(bounds) == {annotated_types.Ge, annotated_types.Le}:
        low, high = bounds[annotated_types.Ge].ge, bounds[annotated_types.Le].le
        return f" from {low:,} to {high:,}"
    parts = [
        f"{word} {getattr(bounds[kind], name):,}"
        for kind, (name, word) in _BOUNDS.items()
        if kind in bounds
    ]
    return (" " if parts else "") + " and ".join(parts)


_BOUNDS = {
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Ge: ("ge", "of at least"),
    annotated_types.Lt: ("lt", "below"),
    annotated_types.Le: ("le", "at most"),
}


def problem_of(key: str, value: object, annotation: Any, expected: str) -> str:
    """What is wrong with a value that its type or range refused, and how it is probably meant."""
    hint = _hint(value, members(annotation))
    return f"{key} is {shown(value)}; expected {expected}" + (f" ({hint})" if hint else "")


def shown(value: object) -> str:
    """A value as a message shows it: short, and never a secret."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    if SECRET_VALUE.search(text):
        return "(hidden)"
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(value: object, kinds: tuple[Any, ...]) -> str | None:
    choices = [
        str(c)
        for kind in kinds
        if typing.get_origin(kind) is Literal
        for c in typing.get_args(kind)
    ]
    if isinstance(value, str):
        return _text_hint(value, kinds, choices)
    if isinstance(value, float) and float not in kinds and int in kinds and value.is_integer():
        return f"write {int(value)}"
    if (
        value is not None
        and not isinstance(value, list | dict | tuple)
        and set(kinds) <= {str, type(None)}
    ):
        return "put it in quotes"
    return None


def _text_hint(value: str, kinds: tuple[Any, ...], choices: list[str]) -> str | None:
    if bool in kinds and value.lower() in ("yes", "no", "on", "off", "y", "n", "1", "0"):
        meant = "true" if value.lower() in ("yes", "on", "y", "1") else "false"
        return f"write {meant}; yes, no, on and off are plain texts in YAML 1.2"
    if value.lower() in ("true", "false") and bool in kinds:
        return "without quotes"
    if choices and (near := nearest(value, choices)):
        return f"did you mean {near}?"
    if int in kinds or float in kinds:
        try:
            number = float(value)
        except ValueError:
            return None
        if float in kinds or number.is_integer():
            return f"write {number:g}, without quotes or leading zeros"
    if any(is_list(kind) for kind in kinds):
        return f"write [{value}]"
    return None

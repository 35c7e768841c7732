"""List the methods: what each is, where it is from, and its settings with their defaults.

lorica methods shows all of them; lorica methods dora shows the settings of one.
"""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

_SHARED = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")


def command(
    word: Annotated[
        str | None, typer.Argument(metavar="[METHOD]", help="show the settings of this one")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib

    found = [_facts(name) for name in _words(word)]
    if json:
        print(jsonlib.dumps(found[0] if word else {"methods": found}))
    elif word:
        print("\n".join(_page(found[0])))
    else:
        print("\n".join(_table(found)))


def _words(word: str | None) -> list[str]:
    from lorica.errors import ConfigError, nearest
    from lorica.methods import WORDS

    if word is None:
        return list(WORDS)
    if word not in WORDS:
        near = nearest(word, WORDS)
        raise ConfigError(
            f"there is no method {word!r}",
            expected=f"one of: {', '.join(WORDS)}",
            mend=f"did you mean {near}?" if near else None,
        )
    return [word]


def _facts(word: str) -> dict[str, Any]:
    """What is known of one word, as JSON has it."""
    from lorica.config import Preset
    from lorica.config.settings import Union, method_settings
    from lorica.methods import WORDS

    known: Any = WORDS[word]
    if isinstance(known, Union):
        return _facts_of_union(word, known)
    method = known.method if isinstance(known, Preset) else known
    settings = [
        {"name": s.key, "default": _plain(s.default), "expected": s.expected, "help": s.help}
        for s in method_settings(method.kind, method)
    ]
    preset = isinstance(known, Preset)
    stands_for = known.values if preset else {}
    proposes = {**getattr(method, "proposes", {}), **(known.proposes if preset else {})}
    return {
        "method": word,
        "title": known.title,
        "kind": method.kind,
        "stands_for": dict(stands_for),
        "proposes": {key: _plain(value) for key, value in proposes.items()},
        "settings": settings,
    }


def _facts_of_union(word: str, known: Any) -> dict[str, Any]:
    """Of several methods that train together: their settings, as far as they have names apart."""
    parts = [_facts(part) for part, _ in known.parts]
    settings = {one["name"]: one for part in parts for one in part["settings"]}
    for part, (_, values) in zip(parts, known.parts, strict=True):
        for name, value in {**part["stands_for"], **values}.items():
            settings[name] = {**settings[name], "default": _plain(value)}
    return {
        "method": word,
        "title": known.title,
        "kind": parts[-1]["kind"],
        "parts": [part for part, _ in known.parts],
        "stands_for": {},
        "proposes": {},
        "settings": list(settings.values()),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _table(found: list[dict[str, Any]]) -> list[str]:
    from lorica.records.lines import aligned

    rows = [["method", "what it trains"], *([one["method"], one["title"]] for one in found)]
    return [
        *aligned(rows, left=rows[0]),
        "",
        "lorica train --method METHOD ...     or, in YAML,     method: METHOD",
        "lorica methods METHOD                shows its settings",
    ]


def _page(one: dict[str, Any]) -> list[str]:
    from lorica.config.text import yaml_text

    lines = [f"{one['method']}: {one['title']}"]
    if one.get("parts"):
        lines.append(f"the same as method: [{', '.join(one['parts'])}], which train together")
    if one["stands_for"]:
        values = ", ".join(f"{key}: {yaml_text(v)}" for key, v in one["stands_for"].items())
        lines.append(f"the same as method: {one['kind']} with {values}")
    if one["proposes"]:
        values = ", ".join(f"{key}: {yaml_text(v)}" for key, v in one["proposes"].items())
        lines += textwrap.wrap(f"proposes {values}; what is given instead wins", 80)
    own = [setting for setting in one["settings"] if setting["name"] not in _SHARED]
    for setting in [*own, *(s for s in one["settings"] if s["name"] in _SHARED)]:
        lines += ["", f"{setting['name']}: {yaml_text(setting['default'])}"]
        lines += textwrap.wrap(setting["help"], 76, initial_indent="    ", subsequent_indent="    ")
    return lines

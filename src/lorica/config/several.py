"""`adapters:` of a run: several adapters that train together on one base, each by its own settings.

adapters:
  - {name: sql, data: sql.jsonl, r: 8}
  - {name: chat, data: chat.jsonl, method: dora, learning_rate: 1e-4}

Settings beside the list are those of all adapters, and what an entry gives is its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorica.config.choose import Found, Methods
from lorica.config.names import ALIASES
from lorica.config.settings import RunConfig, known_settings
from lorica.config.text import Layer
from lorica.config.words import shown
from lorica.errors import ConfigError, nearest

if TYPE_CHECKING:
    from lorica.config.resolve import Resolved

OF_THE_RUN = (
    "dtype",
    "max_length",
    "packing",
    "share_prompts",
    "gradient_checkpointing",
    "reuse_frozen_layers",
    "save_steps",
    "save_total_limit",
    "logging_steps",
)
"""Settings of training that belong to the base, to the task and to what a run writes: one for all
adapters that train together.
"""

OWN = (
    *("data", "eval_data", "test_data", "method", "columns", "format", "metrics"),
    *("eval_size", "eval_records", "init_adapter"),
)
"""Settings beside those of training and of the method that each adapter may have for itself."""

OF_THE_FIRST = ", the first of them"
"""End of the origin of `data` where every adapter has its own, and none is beside them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Places = Mapping[str, str]
"""adapters[0], adapters[0].r, ... -> where that was written."""


def several(
    found: Found,
    places: Places,
    methods: Methods,
    problems: list[str],
    resolve: Callable[..., Resolved],
) -> dict[str, Resolved]:
    """Name -> settings of each adapter. What belongs to a method is taken out of `found`, into the
    entries: `adapters` then says all that was given for them.
    """
    entries, origin = found["adapters"]
    if not _is_list(entries):
        problems.append(f"{origin}: adapters must be a list of two or more, each with a name")
        entries = []
    common = {key: found[key] for key in [*found] if key != "adapters"}
    taken = [key for key in common if key == "method" or key not in known_settings()]
    moved = {key: found.pop(key)[0] for key in taken}
    entries = [{**moved, **_canonical(entry)} for entry in entries]
    found["adapters"] = entries, origin
    if "data" not in found and all("data" in entry for entry in entries) and entries:
        found["data"] = entries[0]["data"], f"{origin}{OF_THE_FIRST}"
    shared = {key: value for key, (value, _) in common.items() if key not in taken}
    if shared.get("data_seed") is None:  # a seed of its own does not change an adapter's records
        shared["data_seed"] = shared.get("seed", 0)
    layer = Layer("settings", shared, {key: where for key, (_, where) in common.items()})
    made: dict[str, Resolved] = {}
    for number, entry in enumerate(entries):
        where = _where(places, origin, number, entry)
        own = _own(entry, lambda key, n=number, w=where: _close(places, n, key, w), problems)
        if "data" not in entry and "data" not in common:
            problems.append(f"{where}: data is missing; give it here, or beside the list for all")
            found["data"] = "missing", f"{origin}{OF_THE_FIRST}"  # told once, here
        elif name := _name(entry, where, made, problems):
            try:
                made[name] = resolve(layer, Layer(where, *own), methods=methods)
            except ConfigError as error:
                named = f"adapter {name!r}"
                problems += [p if named in p else f"{p} ({named})" for p in error.problems]
    return made


def _is_list(entries: Any) -> bool:
    listed = isinstance(entries, list | tuple) and len(entries) > 1
    return listed and all(isinstance(entry, Mapping) for entry in entries)


def _canonical(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {ALIASES.get(key, key): value for key, value in entry.items()}


def _where(places: Places, origin: str, number: int, entry: Mapping[str, Any]) -> str:
    place = places.get(f"adapters[{number}]", origin)
    return f"{place}, adapter {entry['name']!r}" if "name" in entry else f"{place}, adapters"


def _close(places: Places, number: int, key: str, where: str) -> str:
    """Where one setting of an entry stands, with the adapter's name."""
    place = places.get(f"adapters[{number}].{key}")
    return where if place is None else f"{place},{where.partition(',')[2]}"


def _own(
    entry: Mapping[str, Any], where: Callable[[str], str], problems: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins of what an entry gives for its adapter alone."""
    own = {}
    for key, value in entry.items():
        of_all = key in OF_THE_RUN or (key in RunConfig.model_fields and key not in OWN)
        if key == "name":
            continue
        if of_all:
            problems.append(f"{where(key)}: {key} is the same for all adapters; put it beside")
        else:
            own[key] = value
    return own, {key: where(key) for key in own}


def _name(
    entry: Mapping[str, Any], where: str, known: Mapping[str, Any], problems: list[str]
) -> str | None:
    """The name of an adapter; None where `problems` is told what is wrong with it."""
    name = entry.get("name")
    if name is None:
        near = nearest("name", [*entry])
        hint = f"; did you mean that by {near}?" if near else ""
        problems.append(f"{where}: an adapter has no name{hint}")
    elif not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(
            f"{where}: name is {shown(name)}; it must be letters, digits, dot, dash and "
            "underscore, at most 64, a letter or digit first: it names a folder"
        )
    elif name in known:
        problems.append(f"{where}: another adapter has the name {name!r} already")
    else:
        return name
    return None

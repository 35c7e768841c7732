"""Find a place for every tensor of PEFT's file, and every tensor for a place. No data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from lorica.attach.places import Places
from lorica.attach.survey import clean, survey
from lorica.attach.tokens import SETTING, add_rows, rows_of
from lorica.base.storage import weight_shape
from lorica.errors import TargetError
from lorica.files.peft_config import HEADS_OF_PEFT, PeftConfig
from lorica.files.peft_layout import (
    LAYERS,
    PREFIX,
    ROWS,
    Shape,
    Spot,
    below_attention,
    foreign,
    locate,
    modules_of,
    split_key,
)
from lorica.methods.copy import Copy
from lorica.methods.dora import DoRA
from lorica.methods.method import Method
from lorica.methods.tokens import Tokens


@dataclass
class Plan:
    """Where every tensor of a file goes, and what is wrong with the rest.

    Attributes:
        places: for `attach_tensors`, in the order in which `attach` makes them.
        factors: path -> (spot, keys of A, B and, of DoRA, m).
        copies: path -> parameter -> key.
        rows: path of the layer that holds the rows of tokens -> (key, tokens in the file's order).
        repeated: key -> parameter of the base that the file merely repeats, to be compared.
        refusals: path of a layer -> why it carries no adapter.
        seen: what the file speaks of, soundly or not: paths of modules and parameters.
        unexpected, missing, misshapen: problems, a sentence each.
    """

    refusals: dict[str, str] = field(default_factory=dict)
    places: Places = field(default_factory=dict)
    factors: dict[str, tuple[Spot, dict[str, str]]] = field(default_factory=dict)
    copies: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: dict[str, tuple[str, Sequence[int]]] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)


def plan(model: nn.Module, shapes: Mapping[str, Shape], config: PeftConfig) -> Plan:
    """Find the place of every tensor, by names and shapes alone; no data is read."""
    places = survey(model).places.values()
    found = Plan(refusals={place.path: place.refusal for place in places if place.refusal})
    modules = modules_of(model)
    pairs: dict[str, dict[str, str]] = {}
    rows = _plan_rows(found, model, modules, shapes, config)
    rows_at = set(found.places)
    for key, shape in shapes.items():
        if key in rows:
            continue
        stem, factor = split_key(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX):
            found.unexpected.append(f"{key}: it does not start with {PREFIX!r}")
        elif factor:
            pairs.setdefault(stem, {})[factor] = key
        else:
            _plan_plain(found, modules, stem, key, shape, config)
    for stem, keys in pairs.items():
        _plan_pair(found, modules, stem, keys, shapes, config)
    _plan_missing(found, model, modules, config)
    found.unexpected += [
        f"{path}: adapted as a whole, and {SETTING} changes rows of it"
        for path in sorted(rows_at)
        if not isinstance(found.places[path][2], Tokens)
    ]
    _refuse_second_names(found)
    order = {path: i for i, path in enumerate(modules)}
    found.places = dict(sorted(found.places.items(), key=lambda item: _rank(item, order)))
    return found


def _plan_rows(
    found: Plan,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, Shape],
    config: PeftConfig,
) -> set[str]:
    """The rows of trainable tokens; returns their keys."""
    try:
        chosen = rows_of(model, config.tokens)
    except TargetError as error:
        found.unexpected += [f"{SETTING}: {problem}" for problem in error.problems]
        return {key for key in shapes if key.endswith(ROWS)}
    keys = set()
    for rows in chosen:
        key, first = f"{PREFIX}{rows.path}{ROWS}", rows.places[0]
        keys.add(key)
        width = cast(Tensor, modules[first]._parameters["weight"]).shape[1]
        expected = len(rows.indices), width
        if key not in shapes:
            found.missing.append(key)
        elif shapes[key] != expected:
            found.misshapen.append(f"{key}: {shapes[key]}, but the base needs {expected}")
        named = config.tokens
        found.rows[first] = key, named[rows.name] if isinstance(named, Mapping) else named
    add_rows(model, config.tokens, found.places)
    return keys


def _rank(
    item: tuple[str, tuple[nn.Module, str | None, Method]], order: Mapping[str, int]
) -> tuple[int, int]:
    """Layers first, then bare parameters, then copies; each in the order of the model."""
    path, (_, parameter, method) = item
    group = int(parameter not in (None, "weight"))
    group = 3 if isinstance(method, Tokens) else 2 if isinstance(method, Copy) else group
    return group, order[path if path in order else path.rpartition(".")[0]]


def _plan_plain(
    found: Plan,
    modules: Mapping[str, nn.Module],
    name: str,
    key: str,
    shape: Shape,
    config: PeftConfig,
) -> None:
    """A tensor that is no factor: a parameter trained whole, or a repeated one of the base."""
    path, _, parameter = name.rpartition(".")
    repeats = path.endswith(".base_layer")
    path = path.removesuffix(".base_layer")
    own = modules[path]._parameters.get(parameter) if path in modules else None
    other = foreign(name)
    found.seen.add(f"{path}.{parameter}")
    if own is None or other:
        found.unexpected.append(f"{key}: {other or 'the base has no such parameter'}")
    elif (there := weight_shape(modules[path], parameter)) != shape:
        resized = len(there) == len(shape) == 2 and there[1] == shape[1]
        hint = " (a vocabulary of another size? resize the base first)" if resized else ""
        found.misshapen.append(f"{key}: {shape}, but the base has {there}{hint}")
    elif repeats:
        found.repeated[key] = own
    elif not config.may_save_whole(path):
        found.unexpected.append(f"{key}: it lies in none of modules_to_save")
    else:
        found.copies.setdefault(path, {})[parameter] = key
        found.places[path] = modules[path], None, Copy()


def _plan_pair(
    found: Plan,
    modules: Mapping[str, nn.Module],
    stem: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, Shape],
    config: PeftConfig,
) -> None:
    """The two factors of one place, and DoRA's magnitudes."""
    spot = locate(modules, stem, config.target_parameters)
    if isinstance(spot, Spot) and not spot.is_bare:
        spot = found.refusals.get(spot.core, spot)
    if isinstance(spot, str):
        found.unexpected += [f"{key}: {spot}" for key in keys.values()]
        return
    found.seen.add(spot.matched)
    wrong = [key for factor, key in keys.items() if key != spot.key(factor)]
    needed = "ABm" if isinstance(config.method, DoRA) else "AB"
    wrong += [key for factor, key in keys.items() if factor not in needed]
    lacking = [spot.key(f) for f in needed if spot.key(f) not in keys.values()]
    if wrong or lacking:
        found.unexpected += [f"{key}: not the name for a layer of this kind" for key in wrong]
        found.missing += lacking
        return
    selected = (
        config.selects_parameter(spot.matched) if spot.is_bare else config.selects(spot.matched)
    )
    shape_A, shape_B = shapes[keys["A"]], shapes[keys["B"]]
    r, expected = spot.rank(shape_A), config.rank_at(spot.matched)
    if selected is False:
        found.unexpected.append(f"{keys['A']} (and B): the config does not name this place")
    elif r < 1 or (shape_A, shape_B) != spot.shapes(r):
        want_A, want_B = spot.shapes(expected)
        found.misshapen.append(
            f"{stem}: A {shape_A} and B {shape_B}, but the base needs {want_A} and {want_B}"
        )
    elif r != expected:
        found.misshapen.append(f"{stem}: rank {r}, but the config says {expected}")
    elif "m" in keys and shapes[keys["m"]] != spot.magnitude_shape:
        found.misshapen.append(
            f"{keys['m']}: {shapes[keys['m']]}, but the base needs {spot.magnitude_shape}"
        )
    elif "m" in keys and getattr(modules[spot.core], "groups", 1) > 1:
        found.unexpected.append(f"{stem}: DoRA has no length per output of a grouped convolution")
    else:
        found.factors[spot.path] = spot, dict(keys)
        method = config.method_at(spot.matched)
        found.places[spot.path] = modules[spot.core], spot.parameter, method


def _refuse_second_names(found: Plan) -> None:
    """A layer that the model holds under two names can carry the tensors of one of them only."""
    first: dict[tuple[int, str | None], str] = {}
    for path, (module, parameter, _) in found.places.items():
        known = first.setdefault((id(module), parameter), path)
        if known != path:
            found.unexpected.append(f"{path}: the same layer as {known}, which has tensors already")


def _plan_missing(
    found: Plan, model: nn.Module, modules: Mapping[str, nn.Module], config: PeftConfig
) -> None:
    """What the config promises and the file does not hold."""
    for raw_path, module in model.named_modules():
        path = clean(raw_path)
        if path in found.seen or not isinstance(module, (*LAYERS, nn.MultiheadAttention)):
            continue
        if config.selects(path) and not below_attention(modules, path):
            found.missing.append(f"{PREFIX}{path}: its two factors")
    for raw_path, _ in model.named_parameters():
        path = clean(raw_path)
        if path not in found.seen and config.selects_parameter(path):
            found.missing.append(f"{path}: its two factors")
        if path not in found.seen and config.saves_whole(path.rpartition(".")[0]):
            found.missing.append(f"{PREFIX}{path}")
    ignorable = {name for names in HEADS_OF_PEFT.values() for name in names}
    for name in dict.fromkeys(config.modules_to_save):
        held = name in ignorable or any(p == name or p.endswith(f".{name}") for p in modules)
        if not held:
            found.missing.append(f"modules_to_save names {name!r}, which the base does not have")

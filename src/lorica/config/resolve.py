"""Several layers of settings -> one, checked, with the origin of every value.

A later layer wins over an earlier one: usually the command line over the file. Defaults fill the
rest, and `Resolved.decided` adds what a rule settles later, with its reason.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lorica.config.choose import Found, Methods, Part, choose
from lorica.config.contradictions import contradictions
from lorica.config.names import ALIASES, NO_TWIN, SECRET_KEY, SECRET_VALUE
from lorica.config.settings import (
    REQUIRED,
    RunConfig,
    Setting,
    Settings,
    TrainSettings,
    known_settings,
    method_fields,
    method_values,
)
from lorica.config.several import OF_THE_FIRST, several
from lorica.config.text import Layer, yaml_text
from lorica.config.words import is_mapping, problem_of, shown
from lorica.errors import ConfigError, nearest

VERSION = 1
"""Of the settings file; a file may name it as `version: 1`."""

_RULES = {"epochs": "rule: neither epochs nor max_steps is given"}


@dataclass(frozen=True)
class Resolved:
    """All settings of a run.

    Attributes:
        run: what it works on.
        train: how it trains.
        method: the settings object of the method, which is the method; None without methods.
        origins: name -> where its value came from: "default", "run.yaml:7", "--r", "rule: ...".
        notes: what the user should read, such as aliases that were mapped.
        below: the methods that train together with `method`, as one adapter, the lowest first.
        stages: the settings of each stage of a run that has several; `method` is None there.
        adapters: the settings of each adapter of a run that trains several, by name; likewise.
    """

    run: RunConfig
    train: TrainSettings
    method: Any
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()
    below: tuple[Any, ...] = ()
    stages: tuple[Resolved, ...] = ()
    adapters: Mapping[str, Resolved] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """Name -> value, of everything; beside stages, of what is given for all of them."""
        found = {key: getattr(self.run, key) for key in RunConfig.model_fields}
        trained = list(TrainSettings.model_fields)
        if self.stages or self.adapters:  # each has a method, and defaults, of its own
            del found["method"]
            if self.origins.get("data", "").endswith(OF_THE_FIRST):
                del found["data"]
            trained = [key for key in trained if key in self.origins]
        found |= {key: getattr(self.train, key) for key in trained}
        return found if self.below else found | method_values(self.method)

    @property
    def data_seed(self) -> int:
        """The seed by which records are held out and drawn."""
        return self.train.seed if self.run.data_seed is None else self.run.data_seed

    def decided(self, key: str, value: object, reason: str) -> Resolved:
        """The same with one value settled by a rule, such as max_length from the data.

        Raises:
            ConfigError: the value is not a possible one.
        """
        kept = {name: v for name, v in self.values.items() if self.origins[name] != "default"}
        layer = Layer("settings", kept, {name: self.origins[name] for name in kept})
        methods = {m.kind: type(m) for m in (*self.below, self.method) if m is not None}
        made = resolve(layer, Layer(f"rule: {reason}", {key: value}), methods=methods)
        return dataclasses.replace(made, notes=self.notes)

    def to_yaml(self) -> str:
        """YAML that resolves to the same settings, every line with the origin of its value."""
        values, lines = self.values, [f"version: {VERSION}"]
        own = [*RunConfig.model_fields, *TrainSettings.model_fields]
        groups = {
            "run": [key for key in RunConfig.model_fields if key in values],
            "training": [key for key in TrainSettings.model_fields if key in values],
            f"method: {self.run.method}": [key for key in values if key not in own],
        }
        for title, keys in groups.items():
            lines += ["", f"# {title}"] if keys else []
            for key in keys:
                setting = f"{key}: {yaml_text(_plain(values[key]))}"
                lines.append(f"{setting:<44}  # {_printable(self.origins[key])}")
        return "\n".join(lines) + "\n"


def resolve(
    *layers: Layer | tuple[str, Mapping[str, Any]],
    methods: Methods | None = None,
) -> Resolved:
    """Put layers of settings together; later ones win.

    Args:
        layers: `load_yaml`, `flag_layer`, or (origin, mapping). Names are flat, and may be aliases.
        methods: the methods there are, kind -> settings class, and their further names; `method`
            chooses one of them.
            Without any, no method's settings are known.

    Raises:
        ConfigError: names that are no setting, values of a wrong type or out of range,
            contradictions, secrets; all that is wrong in all layers at once, with its origin.
    """
    stack = [layer if isinstance(layer, Layer) else Layer(*layer) for layer in layers]
    problems: list[str] = []
    notes: list[str] = []
    found = _merge(stack, known_settings(methods), problems, notes)
    staged = methods and found.get("stages", (None, ""))[0] is not None
    shared = methods and not staged and found.get("adapters", (None, ""))[0] is not None
    stages = _stages(found, methods or {}, problems) if staged else []
    places = {key: where for layer in stack for key, where in layer.origins.items() if "[" in key}
    adapters = several(found, places, methods or {}, problems, resolve) if shared else {}
    parts = [] if staged or shared else choose(found, methods or {}, problems)
    of_methods: list[str] = []
    made = [_made(part, of_methods) for part in parts]
    if len(made) > 1 and None not in made:  # written as settings that lead to the same again
        origin = found["method"][1]
        found["method"] = [{"method": m.kind, **method_values(m)} for m in made], origin
    elif parts:
        found |= parts[-1].given
    values = {key: value for key, (value, _) in found.items()}
    origins = {key: origin for key, (_, origin) in found.items()}
    run = _build(RunConfig, values, origins, problems)
    train = _build(TrainSettings, values, origins, problems)
    problems += of_methods
    if run is not None and train is not None:
        problems += [_placed(problem, origins) for problem in contradictions(run, train)]
    problems = list(dict.fromkeys(problems))  # each stage finds what is wrong for all
    if problems or run is None or train is None:
        reasons = f", for {len(problems)} reasons" if len(problems) > 1 else ""
        raise ConfigError(f"the settings cannot be used{reasons}", problems=problems)
    *below, method = made or [None]
    resolved = Resolved(run, train, method, origins, tuple(notes), tuple(below), tuple(stages))
    resolved = dataclasses.replace(resolved, adapters=adapters)
    known = known_settings({part.kind.kind: part.kind for part in parts})
    for key, value in resolved.values.items():
        if key not in origins or (values[key] is None and value is not None):
            same = _plain(value) == _plain(known[key].default)
            origins[key] = "default" if same else _RULES[key]
    return resolved


def _stages(found: Found, methods: Methods, problems: list[str]) -> list[Resolved]:
    """The settings of every stage: those beside the list, and over them its own. What belongs to a
    method and lies beside the list is taken out of `found`, and told.
    """
    entries, origin = found["stages"]
    listed = isinstance(entries, list | tuple) and all(isinstance(e, Mapping) for e in entries)
    if not listed or len(entries) < 2:
        problems.append(f"{origin}: stages must be a list of at least two mappings of settings")
        entries = []
    for key in [key for key in found if key == "method" or key not in known_settings()]:
        _, where = found.pop(key)
        problems.append(f"{where}: {key} has no effect beside stages; give it to one of them")
    common = {key: value for key, (value, _) in found.items() if key != "stages"}
    layer = Layer("settings", common, {key: where for key, (_, where) in found.items()})
    made = []
    for number, entry in enumerate(entries, 1):
        where = f"{origin}, stage {number}"
        keys = {ALIASES.get(key, key): key for key in entry}
        of_all = [k for k in keys if k in {*RunConfig.model_fields, "seed", "dtype"} - {"method"}]
        problems += [f"{where}: {key} is the same for all stages; put it beside" for key in of_all]
        own = {keys[key]: entry[keys[key]] for key in keys if key not in of_all}
        try:
            made.append(resolve(layer, Layer(where, own), methods=methods))
        except ConfigError as error:
            problems += error.problems
    return made


def json_schema(methods: Methods | None = None) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a settings file, by which editors complete and check.

    Nothing is required in it: what a file leaves out may stand on the command line.
    """
    properties: dict[str, Any] = {"version": {"const": VERSION}}
    by_model = {
        key: schema
        for model in (RunConfig, TrainSettings)
        for key, schema in model.model_json_schema()["properties"].items()
    }
    for key, setting in known_settings(methods).items():
        schema = by_model.get(key) or TypeAdapter(setting.annotation).json_schema()
        schema = {k: v for k, v in schema.items() if k not in ("title", "description", "default")}
        schema["description"] = setting.help
        if setting.default is not REQUIRED:
            schema["default"] = _plain(setting.default)
        properties[key] = schema
        for alias in setting.aliases:
            properties[alias] = {"description": f"the same as {key}", "deprecated": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Lorica: settings of a run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _merge(
    stack: Sequence[Layer], known: Mapping[str, Setting], problems: list[str], notes: list[str]
) -> Found:
    """Name -> (value, origin) over all layers, with aliases mapped."""
    found: Found = {}
    for layer in stack:
        written: dict[str, str] = {}
        for name, value in layer.values.items():
            origin = layer.where(name)
            key = _key(name, known)
            if name == "version":
                if value != VERSION or isinstance(value, bool):
                    problems.append(f"{origin}: version is {shown(value)}; it must be {VERSION}")
            elif _hides_secret(name, value, key, known):
                problems.append(
                    f"{origin}: {_short(name)} looks like a secret, and settings are copied into "
                    "the run folder; put it into the environment, such as HF_TOKEN"
                )
            elif key is None:
                problems.append(f"{origin}: {_unknown(name, value, known)}")
            elif key in written:
                problems.append(
                    f"{origin}: {name} and {written[key]} are the same setting; keep one"
                )
            else:
                written[key] = name
                found[key] = (value, origin)
                if key != name:
                    notes.append(f"{origin}: {name} is taken as {key}")
    return found


def _key(name: str, known: Mapping[str, Setting]) -> str | None:
    """The setting that a name stands for."""
    for spelling in (name, name.replace("-", "_")):
        key = ALIASES.get(spelling, spelling)
        if key in known:
            return key
    return None


def _unknown(name: str, value: object, known: Mapping[str, Setting]) -> str:
    if name in NO_TWIN:
        return f"{name} is not a setting here: {NO_TWIN[name]}"
    names = [n for key, setting in known.items() for n in (key, *setting.aliases) if len(n) > 1]
    near = nearest(name, names)
    key = ALIASES.get(near, near) if near else None
    if isinstance(value, dict) and not (key and any(map(is_mapping, known[key].kinds))):
        return f"{name} is not a setting; settings lie flat, without sections"
    if key:
        return f"{name} is not a setting; did you mean {key}?"
    return f"{_short(name)} is not a setting; `lorica train --help` lists them"


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


def _hides_secret(name: str, value: object, key: str | None, known: Mapping[str, Setting]) -> bool:
    if key is None and SECRET_KEY.search(name) and not get_close_matches(name, known, 1, 0.85):
        return True  # eos_tokn and the like are slips, not secrets
    return bool(SECRET_VALUE.search(json.dumps(value, default=str, ensure_ascii=False)))


def _build(
    kind: type[Settings], values: Mapping[str, Any], origins: Mapping[str, str], problems: list[str]
) -> Any:
    try:
        return kind(**{key: values[key] for key in kind.model_fields if key in values})
    except ConfigError as error:
        problems += [_placed(problem, origins) for problem in error.problems]
        return None


def _made(part: Part, problems: list[str]) -> Any:
    """The settings object of one method of a run."""
    values = {key: value for key, (value, _) in part.given.items()}
    origins = {key: origin for key, (_, origin) in part.given.items()}
    return _build_method(part.kind, values, origins, problems)


def build_method(kind: Any, values: Mapping[str, Any]) -> Any:
    """The settings object of a method (its class is `kind`) from values as JSON has them.

    Raises:
        ConfigError: unknown names, wrong types, values out of range; all at once.
    """
    known = {setting.key for setting, _ in method_fields(kind.kind, kind)}
    problems = [
        f"{str(key)[:60]} is not a setting of {kind.kind}" for key in values if key not in known
    ]
    made = _build_method(kind, values, {}, problems)
    if problems:
        raise ConfigError(f"the settings of {kind.kind} cannot be used", problems=problems)
    return made


def _build_method(
    kind: Any, values: Mapping[str, Any], origins: Mapping[str, str], problems: list[str]
) -> Any:
    """The method's settings object: types by its annotations here, ranges by the class itself."""
    given, wrong = {}, []
    for setting, _ in method_fields(kind.kind, kind):
        if setting.key not in values:
            if setting.default is REQUIRED:
                wrong.append(f"{setting.key} is missing; it is {setting.help}")
            continue
        value = values[setting.key]
        try:
            given[setting.key] = _typed(setting.annotation, value)
        except ValidationError:
            wrong.append(problem_of(setting.key, value, setting.annotation, setting.expected))
    try:
        made = kind(**given)
    except ConfigError as error:
        made, wrong = None, wrong + list(error.problems)
    problems += [_placed(problem, origins) for problem in wrong]
    return None if wrong else made


def _typed(annotation: Any, value: Any) -> Any:
    """A value as its annotation has it: strict, but lists become tuples, as in JSON."""
    adapter = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    try:
        text = json.dumps(_plain(value), ensure_ascii=False)
    except (TypeError, ValueError):
        return adapter.validate_python(value, strict=True)
    return adapter.validate_json(text, strict=True)


def _placed(problem: str, origins: Mapping[str, str]) -> str:
    """A problem with the place where its setting was given; it begins with the setting's name."""
    word = re.match(r"\w*", problem)
    key = word.group() if word else ""
    if problem.startswith(f"{key} is missing"):
        return f"{problem}; give it as --{key.replace('_', '-')}"
    return f"{origins[key]}: {problem}" if key in origins else problem


def _plain(value: Any) -> Any:
    """A value as YAML and JSON have it: lists and dictionaries all the way down."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(inner) for inner in value]
    return value


def _printable(text: str) -> str:
    """Text for a comment: a line break in a file's name must not become a setting."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)

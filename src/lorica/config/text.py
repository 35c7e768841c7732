"""Settings as text: YAML files and command-line flags, into plain values with the place of each.

YAML is read by the rules of YAML 1.2, because those of 1.1 (PyYAML's own) surprise: there `1e-4` is
a text, `no` is false, `010` is 8 and `12:30` is 750. A settings file is flat and small, so whatever
could hide something is refused: duplicate keys, a second document, tags, anchors, megabytes.
"""

import json
import math
import re
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lorica.config.settings import Setting
from lorica.config.words import is_list, is_mapping, members
from lorica.errors import ConfigError

MAX_BYTES = 256_000
MAX_DEPTH = 10
MAX_NAMES = 500

_INTEGER = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = (
    r"[-+]?(?:(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
)
_PLAIN = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (_INTEGER, "-+0123456789"),
    "tag:yaml.org,2002:float": (_FLOAT + r"|\.(?:nan|NaN|NAN)", "-+.0123456789"),
}
_MEND = "write one `name: value` a line"


class Layer(NamedTuple):
    """Some settings from one place. A plain tuple (origin, values) serves as well.

    Attributes:
        origin: where they come from, in a word or two: "run.yaml", "command line", "rule: ...".
        values: name -> value; names may be aliases.
        origins: name -> a closer origin, such as "run.yaml:7" or "--r".
    """

    origin: str
    values: Mapping[str, Any]
    origins: Mapping[str, str] = {}

    def where(self, name: str) -> str:
        return self.origins.get(name, self.origin)


def load_yaml(path: str | Path) -> Layer:
    """Read a settings file.

    Raises:
        ConfigError: no such file, not UTF-8, too large, or not a flat YAML mapping; with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file", expected="a YAML file of settings")
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_BYTES:,} bytes",
            expected="a file of settings; data goes into a file of its own, named by `data:`",
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8", mend="save the file as UTF-8"
        ) from None
    return parse_yaml(text, name=path.name)


def parse_yaml(text: str, *, name: str = "settings") -> Layer:
    """Read settings from YAML text; `name` is what messages and origins call it.

    Raises:
        ConfigError: the text is not one flat YAML mapping; with the line.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES:,} characters")
    if (unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text)) is not None:
        line = text.count("\n", 0, unprintable.start()) + 1
        raise ConfigError(
            f"{name}:{line}: the character U+{ord(unprintable.group()):04X} is not allowed in YAML",
            mend="write it as an escape in a text in double quotes",
        )
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, MappingNode):
            what = "holds no settings" if node is None else "is not a mapping of names to values"
            raise ConfigError(f"{name} {what}", mend=_MEND)
        if len(node.value) > MAX_NAMES:
            raise ConfigError(f"{name} has {len(node.value):,} names, more than there are settings")
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = str(error.problem or error.context)[:300]
        raise ConfigError(f"{place}: {problem}", mend=_MEND) from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise ConfigError(f"{name} holds a number of too many digits", mend=_MEND) from None
    finally:
        loader.dispose()
    return Layer(name, values, {key: f"{name}:{line}" for key, line in _lines_of(node)})


def _lines_of(mapping: MappingNode) -> typing.Iterator[tuple[str, int]]:
    """Every name with its line; those in lists of mappings as adapters[0] and adapters[0].r."""
    for key, value in mapping.value:
        yield key.value, key.start_mark.line + 1
        entries: list[Node] = value.value if isinstance(value, SequenceNode) else []
        for number, entry in enumerate(entries):
            if isinstance(entry, MappingNode):
                place = f"{key.value}[{number}]"
                yield place, entry.start_mark.line + 1
                for inner, _ in entry.value:
                    yield f"{place}.{inner.value}", inner.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """Plain values only, and the tags that these have by YAML 1.2."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}
    depth = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Stop at a depth before the scanner does, whose time grows with its square."""
        if self.flow_level > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(None, None, problem, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self._refuse("anchors (&) and aliases (*) are not taken in settings", event)
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(f"the tag {tag} is not taken in settings", event)
        if self.depth >= MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                self._refuse("a name must be a text; put it in quotes if it is meant as one", key)
            if key.value in seen:
                self._refuse(f"{key.value} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def _refuse(self, problem: str, thing: Any) -> typing.NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, thing.start_mark)


class _Dumper(yaml.SafeDumper):
    """Texts are quoted where YAML 1.1 or 1.2 would read something else."""


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    """In double quotes, which hold everything in one line, where YAML knows a line break in it."""
    style = '"' if re.search(r"[\r\n\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, (_pattern, _first) in _PLAIN.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))
)


def yaml_text(value: object) -> str:
    """One value in one line of YAML, which `parse_yaml` reads as the same value."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def flag_layer(flags: Mapping[str, str], known: Mapping[str, Setting]) -> Layer:
    """The layer of a command line: names without dashes in front -> what stood behind them."""
    names = {flag: flag.lstrip("-").replace("-", "_") for flag in flags}
    return Layer(
        "command line",
        {names[flag]: parse_flag(names[flag], text, known) for flag, text in flags.items()},
        {name: "--" + name.replace("_", "-") for name in names.values()},
    )


def parse_flag(name: str, text: str, known: Mapping[str, Setting]) -> Any:
    """What a text on the command line stands for, by the type of the setting.

    `1e-4` and `true` become a number and a truth, `a,b` a list where one is expected, JSON (or
    `a=1,b=2`) a mapping, `null` nothing. What fits no type of the setting stays the text it is, for
    `resolve` to refuse together with all other problems.
    """
    setting = known.get(name) or next((s for s in known.values() if name in s.aliases), None)
    return text if setting is None else _value(text, setting.kinds)


def _value(text: str, kinds: tuple[Any, ...]) -> Any:
    for read in (_null, _mapping, _choice, _truth, _number, _list):
        value = read(text, kinds)
        if value is not _NOT:
            return value
    if text.startswith('"') and (quoted := _json(text)) is not _NOT and isinstance(quoted, str):
        return quoted
    return text


_NOT = object()


def _null(text: str, kinds: tuple[Any, ...]) -> Any:
    return None if type(None) in kinds and text in ("null", "none", "None") else _NOT


def _choice(text: str, kinds: tuple[Any, ...]) -> Any:
    choices = [
        c for kind in kinds if typing.get_origin(kind) is Literal for c in typing.get_args(kind)
    ]
    return text if text in choices else _NOT


def _truth(text: str, kinds: tuple[Any, ...]) -> Any:
    return text == "true" if bool in kinds and text in ("true", "false") else _NOT


def _number(text: str, kinds: tuple[Any, ...]) -> Any:
    if int in kinds and re.fullmatch(_INTEGER, text) and len(text) < 100:
        return int(text)
    if float in kinds and re.fullmatch(_FLOAT, text) and len(text) < 100:
        return float(text)
    return _NOT


def _list(text: str, kinds: tuple[Any, ...]) -> Any:
    """JSON, or parts between commas; a setting that takes a bare text too needs a comma in it."""
    lists = [kind for kind in kinds if is_list(kind)]
    if not lists:
        return _NOT
    if text.startswith("["):
        found = _json(text)
        return found if isinstance(found, list) else _NOT
    if str in kinds and ("," not in text or re.search(r"\{[^}]*,", text)):
        return _NOT
    inner = members((*typing.get_args(lists[0]), str)[0])
    parts = [_value(part.strip(), inner) for part in text.split(",") if part.strip()]
    wrong = str not in inner and any(isinstance(part, str) for part in parts)
    return _NOT if wrong else parts


def _mapping(text: str, kinds: tuple[Any, ...]) -> Any:
    found = [kind for kind in kinds if is_mapping(kind)]
    if not found:
        return _NOT
    if text.startswith("{"):
        value = _json(text)
        return value if isinstance(value, dict) else _NOT
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        return _NOT
    inner = members((*typing.get_args(found[0]), str, str)[1])
    return {name.strip(): _value(value.strip(), inner) for name, _, value in pairs}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT

"""Read a run folder back: strict, but for the last line of an append-only file, which a crash may
have torn.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lorica.errors import DataError
from lorica.records import folder as layout

T = TypeVar("T")
MAX_DEPTH = 20
"""Of lists and mappings in a settings file."""


@dataclass(frozen=True)
class Setting:
    """A line of config.yaml: the dotted key, the value as written, and the origin from its comment
    ("" without one).
    """

    key: str
    value: str
    origin: str

    @property
    def is_default(self) -> bool:
        return self.origin.lower().startswith("default")


@dataclass(frozen=True)
class Run:
    """Everything a run folder says about its run.

    Attributes:
        status: "running", "finished", "interrupted", "failed", or "stopped" where the manifest says
            running but no process holds the folder: it was killed.
        relevance: what records decided about the adapter; empty where they decided nothing.
        rows, events, samples: as written, in order. notes: what was passed over while reading, as
            sentences.
    """

    path: Path
    status: str
    manifest: dict
    settings: tuple[Setting, ...]
    rows: tuple[dict, ...]
    events: tuple[dict, ...]
    samples: tuple[dict, ...]
    notes: tuple[str, ...]
    relevance: dict = field(default_factory=dict)


def read_run(path: str | Path) -> Run:
    """Read the run in the folder `path`, without its lock, so also while it trains.

    Raises:
        DataError: there is no run in `path`, or files of it cannot be read; all problems at once,
            with file and line.
    """
    path = Path(path)
    if not (path / layout.MANIFEST).is_file():
        raise DataError(
            f"{path} is not a run folder",
            expected=f"a folder with {layout.MANIFEST}, written by lorica train",
            mend="check the path" + _nearby_runs(path),
        )
    problems: list[str] = []
    notes: list[str] = []
    manifest = _collect(read_manifest, path / layout.MANIFEST, problems, {})
    settings = _collect(read_settings, path / layout.CONFIG, problems, ())
    there = (path / layout.RELEVANCE).exists()
    relevance = _collect(read_manifest, path / layout.RELEVANCE, problems, {}) if there else {}
    files = {}
    for name in (layout.METRICS, layout.EVENTS, layout.SAMPLES):
        lines = _collect(read_lines, path / name, problems, Lines((), None, ()))
        problems += lines.broken
        notes += [lines.torn] if lines.torn else []
        files[name] = lines.values
    if problems:
        raise DataError(
            f"the run in {path} cannot be read",
            problems=problems,
            mend="restore these files, or remove the broken lines",
        )
    status = str(manifest.get("status", "unknown"))
    if status == "running" and not layout.lock_is_held(path):
        status = "stopped"
    return Run(
        path=path,
        status=status,
        manifest=manifest,
        settings=settings,
        rows=files[layout.METRICS],
        events=files[layout.EVENTS],
        samples=files[layout.SAMPLES],
        notes=tuple(notes),
        relevance=relevance,
    )


@dataclass(frozen=True)
class Lines:
    """The objects of a JSONL file; `torn`: a sentence on an unfinished last line; `broken`: one per
    other bad line.
    """

    values: tuple[dict, ...]
    torn: str | None
    broken: tuple[str, ...]


def read_lines(path: Path) -> Lines:
    """Read a JSONL file of objects; an absent file has none."""
    if not path.exists():
        return Lines((), None, ())
    raw = path.read_bytes().split(b"\n")
    values, broken, torn = [], [], None
    last = len(raw) - 1  # b"" where the file ends with a newline
    for index, line in enumerate(raw):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"expected an object, found {type(value).__name__}")
            values.append(value)
        except (ValueError, RecursionError) as error:
            if index == last:
                torn = f"{path.name}: the last line ({index + 1}) is torn and was passed over"
            else:
                broken.append(f"{path.name}:{index + 1}: {error}")
    return Lines(tuple(values), torn, tuple(broken))


def read_manifest(path: Path) -> dict:
    """Read run.json, or another object of JSON.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


class _Plain(yaml.SafeLoader):
    """Lorica writes no aliases, and nested ones would be spelled out without end; nor does it nest
    lists deeply, which takes the scanner time that grows with the square of the depth.
    """

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                None, None, "aliases (*) are not read in settings", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def read_settings(path: Path) -> tuple[Setting, ...]:
    """Read config.yaml with its trailing comments; an absent file has no settings.

    Raises:
        ValueError: it is not YAML, or not a mapping.
    """
    if not path.exists():
        return ()
    text = path.read_text("utf-8")
    try:
        root = yaml.compose(text, Loader=_Plain)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if root is None:
        return ()
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("expected a mapping of settings")
    return tuple(_leaves(root, "", text.splitlines()))


def _leaves(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Setting]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _leaves(value, f"{name}.", lines)
            continue
        origin = _comment(value.end_mark, lines) or _comment(key.end_mark, lines)
        yield Setting(name, _value_text(value), origin)


def _value_text(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_value_text(item) for item in node.value) + "]"
    if isinstance(node, yaml.MappingNode):
        return (
            "{" + ", ".join(f"{key.value}: {_value_text(value)}" for key, value in node.value) + "}"
        )
    return str(node.value) if node.value != "" else '""' if getattr(node, "style", None) else "null"


def _comment(mark: yaml.Mark | None, lines: list[str]) -> str:
    """The comment behind a value. A block value ends on the line after it, which then has nothing
    before the mark.
    """
    if mark is None or mark.line >= len(lines):
        return ""
    before, sign, comment = lines[mark.line][mark.column :].partition("#")
    # between a key and its block of values only the colon stands
    return comment.strip() if sign and before.strip() in ("", ":") and mark.column else ""


def _collect(read: Callable[[Path], T], path: Path, problems: list[str], otherwise: T) -> T:
    try:
        return read(path)
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: {error}")
        return otherwise


def _nearby_runs(path: Path) -> str:
    parent = path if path.is_dir() else path.parent
    if not parent.is_dir():
        return ""
    runs = sorted(child.name for child in parent.iterdir() if (child / layout.MANIFEST).is_file())
    return f"; {parent} holds the runs {', '.join(runs[:5])}" if runs else ""

"""Loss of power: what was not synced may be gone, in any combination, and names before contents.

kill -9 cannot show this, because the system still writes what a dead process handed to it. So the
calls of an operation are logged, and after every prefix of the log the states are built that a
disk could hold if the power went then:

    what a file got since its last fsync        may be lost: all, each write alone, half of the last
    what a folder got since its last fsync      (new names, renames, removals) may be lost as well,
    all of it or each change alone, and independently of the contents
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lorica.files import folder as publishing


@dataclass
class Node:
    """A file or a folder by identity, whatever its name is by now."""

    is_folder: bool
    raw: bytes = b""
    entries: dict[str, "Node"] = field(default_factory=dict)


@dataclass
class Step:
    """One logged call.

    Attributes:
        kind: "write" (file, place, data), "name" (folder: name -> node or None), "sync".
        node: whose content or entries change, or are synced.
        change: the new bytes with their place; or names with what they lead to from now on.
    """

    kind: str
    node: Node
    change: Any = None


class Log:
    """The calls of an operation under one folder, and the tree they began with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []
        self.tree = _read(root)
        self.identity: dict[int, Node] = {}  # id in `tree` -> the node that the calls change
        self._now = _copy(self.tree, self.identity)
        self._open: dict[int, tuple[Node, int]] = {}

    # where a path leads now

    def node(self, path: Any) -> Node | None:
        found: Node | None = self._now
        for part in Path(os.path.abspath(path)).relative_to(self.root).parts:
            found = found.entries.get(part) if found else None
        return found

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(os.path.abspath(path)).is_relative_to(
            self.root
        )

    def name(self, path: Any, node: Node | None) -> None:
        """A name appears, or disappears with None."""
        parent = self.node(Path(path).parent)
        assert parent is not None
        self.add(Step("name", parent, {Path(path).name: node}))

    def add(self, step: Step) -> None:
        self.steps.append(step)
        _apply(step)

    # the calls

    def opened(self, path: Any, flags: int, descriptor: int) -> None:
        if not self.inside(path):
            return
        node = self.node(path)
        if node is None and flags & os.O_CREAT:
            node = Node(is_folder=False)
            self.name(path, node)
        if node is not None:
            self._open[descriptor] = node, len(node.raw) if flags & os.O_APPEND else 0

    def written(self, descriptor: int, data: bytes) -> None:
        if descriptor in self._open:
            node, place = self._open[descriptor]
            self.add(Step("write", node, (place, bytes(data))))
            self._open[descriptor] = node, place + len(data)

    def synced(self, descriptor: int) -> None:
        if descriptor in self._open:
            self.add(Step("sync", self._open[descriptor][0]))

    def closed(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)

    def renamed(self, source: Any, target: Any) -> None:
        if self.inside(source):
            node = self.node(source)
            if Path(source).parent == Path(target).parent:  # one change of one folder
                folder = self.node(Path(source).parent)
                assert folder is not None
                names = {Path(target).name: node, Path(source).name: None}
                self.add(Step("name", folder, names))
            else:
                raise AssertionError("nothing here moves between folders")

    def exchanged(self, one: Any, other: Any) -> None:
        folder = self.node(Path(one).parent)
        assert folder is not None
        names = {Path(one).name: self.node(other), Path(other).name: self.node(one)}
        self.add(Step("name", folder, names))

    # what a disk may hold

    def states(self, *, without_sync: int | None = None) -> Iterator[tuple[int, str, Node]]:
        """(calls made, what was lost, the tree) for every prefix and every way to lose.

        Args:
            without_sync: leave out this one of the syncs: for the control, which must fail then.
        """
        syncs = [i for i, step in enumerate(self.steps) if step.kind == "sync"]
        gone = syncs[without_sync] if without_sync is not None else -1
        for end in range(len(self.steps) + 1):
            prefix = [s for i, s in enumerate(self.steps[:end]) if i != gone]
            for word, steps in _losses(prefix):
                yield end, word, self._built(steps)

    def num_syncs(self) -> int:
        return sum(step.kind == "sync" for step in self.steps)

    def _built(self, steps: list[Step]) -> Node:
        """The tree of the beginning with these steps, on nodes of its own."""
        copies: dict[int, Node] = {}
        tree = _copy(self.tree, copies)
        known = {id(self.identity[key]): node for key, node in copies.items()}

        def own(node: Node | None) -> Node | None:
            if node is None:
                return None
            if id(node) not in known:
                known[id(node)] = Node(node.is_folder)
            return known[id(node)]

        for step in steps:
            change = step.change
            if step.kind == "name":
                change = {name: own(node) for name, node in change.items()}
            target = own(step.node)
            assert target is not None
            _apply(Step(step.kind, target, change))
        return tree


def _apply(step: Step) -> None:
    if step.kind == "write":
        place, data = step.change
        raw = step.node.raw.ljust(place, b"\0")
        step.node.raw = raw[:place] + data + raw[place + len(data) :]
    elif step.kind == "name":
        for name, node in step.change.items():
            step.node.entries.pop(name, None)
            if node is not None:
                step.node.entries[name] = node


def _losses(prefix: list[Step]) -> Iterator[tuple[str, list[Step]]]:
    """What may be left of the steps made so far."""
    synced: dict[int, int] = {}
    for place, step in enumerate(prefix):
        if step.kind == "sync":
            synced[id(step.node)] = place
    loose = [i for i, s in enumerate(prefix) if s.kind != "sync" and i > synced.get(id(s.node), -1)]
    data = [i for i in loose if prefix[i].kind == "write"]

    def without(places: list[int]) -> list[Step]:
        return [step for i, step in enumerate(prefix) if i not in places]

    yield "nothing", prefix
    if loose:
        yield "all that was not synced", without(loose)
    if data:
        yield "contents, but no names", without(data)
        yield "names, but no contents", without([i for i in loose if i not in data])
        place, raw = prefix[data[-1]].change
        half = Step("write", prefix[data[-1]].node, (place, raw[: len(raw) // 2]))
        yield "half of the last write", [*prefix[: data[-1]], half, *prefix[data[-1] + 1 :]]
    for i in loose:
        yield f"call {i + 1} alone", without([i])


def _read(path: Path) -> Node:
    if path.is_dir():
        return Node(True, entries={p.name: _read(p) for p in sorted(path.iterdir())})
    return Node(False, raw=path.read_bytes())


def _copy(node: Node, known: dict[int, Node]) -> Node:
    """A copy of a tree; `known` maps the id of every node to its copy."""
    made = known[id(node)] = Node(node.is_folder, node.raw)
    made.entries = {name: _copy(child, known) for name, child in node.entries.items()}
    return made


def write_tree(node: Node, path: Path) -> None:
    """Put a tree on the disk, so that it can be read as after the loss."""
    if node.is_folder:
        path.mkdir()
        for name, child in node.entries.items():
            write_tree(child, path / name)
    else:
        path.write_bytes(node.raw)


_LOGGED = ("open", "write", "fsync", "close", "rename", "replace", "mkdir", "unlink", "rmdir")


@contextmanager
def logged(root: Path) -> Iterator[Log]:
    """Log the calls under `root` while they are made."""
    log = Log(root)
    real = {name: getattr(os, name) for name in _LOGGED}

    def open_(path, flags, *rest, **named):
        descriptor = real["open"](path, flags, *rest, **named)
        if named.get("dir_fd") is None:
            log.opened(path, flags, descriptor)
        return descriptor

    def write(descriptor, data):
        count = real["write"](descriptor, data)
        log.written(descriptor, bytes(data)[:count])
        return count

    def fsync(descriptor):
        real["fsync"](descriptor)
        log.synced(descriptor)

    def close(descriptor):
        log.closed(descriptor)
        real["close"](descriptor)

    def moved(name: str) -> Callable:
        def call(source, target, **named):
            real[name](source, target, **named)
            log.renamed(source, target)

        return call

    def mkdir(path, *rest, **named):
        real["mkdir"](path, *rest, **named)
        if log.inside(path):
            log.name(path, Node(is_folder=True))

    def removed(name: str) -> Callable:
        def call(path, **named):
            place = path
            if named.get("dir_fd") is not None:  # as shutil.rmtree does
                place = os.path.join(os.readlink(f"/proc/self/fd/{named['dir_fd']}"), path)
            real[name](path, **named)
            if log.inside(place) and log.node(Path(place).parent) is not None:
                log.name(place, None)

        return call

    def exchange(new, old):
        done = publishing_exchange(new, old)
        if done:
            log.exchanged(new, old)
        return done

    publishing_exchange = publishing.exchange
    replacements = {
        "open": open_,
        "write": write,
        "fsync": fsync,
        "close": close,
        "rename": moved("rename"),
        "replace": moved("replace"),
        "mkdir": mkdir,
        "unlink": removed("unlink"),
        "rmdir": removed("rmdir"),
    }
    with ExitStack() as stack:
        for name, call in replacements.items():
            stack.enter_context(mock.patch.object(os, name, call))
        stack.enter_context(mock.patch.object(publishing, "exchange", exchange))
        yield log


def violations(
    log: Log,
    place: Path,
    judge: Callable[[Path, bool], str | None],
    *,
    without_sync: int | None = None,
    first_only: bool = False,
) -> tuple[int, list[str]]:
    """Number of states, and what was wrong in them.

    Args:
        judge: what is wrong with a folder, given whether the operation had ended by then.
    """
    number, found, seen = 0, [], set()
    for end, lost, tree in log.states(without_sync=without_sync):
        ended = end == len(log.steps)
        key = _print(tree), ended
        number += 1
        if key in seen:
            continue
        seen.add(key)
        folder = place / "state"
        write_tree(tree, folder)
        if fault := judge(folder, ended):
            found.append(f"after call {end} of {len(log.steps)}, lost {lost}: {fault}")
        shutil.rmtree(folder)
        if found and first_only:
            break
    return number, found


def _print(node: Node) -> Any:
    if node.is_folder:
        return tuple((name, _print(child)) for name, child in sorted(node.entries.items()))
    return node.raw

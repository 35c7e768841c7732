r"""Patterns over module paths, matched in time linear in the path. No user text ever reaches `re`.

Three spellings, told apart by their characters (see `spelling`):

    name     q_proj, self_attn.q_proj       the whole path, or its end after a dot
    glob     layers.[0-3].*.{q,v}_proj      likewise; * any run of characters, ? one character but
                                            a dot, {a,b} alternatives, [qv] characters,
                                            [0-13,20] whole numbers
    regex    .*\.layers\.\d+\.(q|v)_proj    the whole path; PEFT's spelling, read from its files.
                                            A leading "regex:" forces this reading.

Python's `re` backtracks: "(\w+\.?)+X" on a path of 49 characters runs for seconds, and adapter
files come from strangers. Here a pattern becomes a nondeterministic automaton that is walked with
the set of all its states (Thompson 1968, "Regular Expression Search Algorithm"), so that no pattern
can be slow. What is not regular (back references, look-arounds but a leading negative look-ahead)
is refused.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from lorica.errors import ConfigError

Value = TypeVar("Value")
Spelling = Literal["name", "glob", "regex"]

MAX_LENGTH = 4096
MAX_STATES = 8192
MAX_ACTIVE = 1024
"""States that may be active at once: what bounds the cost of one character."""
MAX_REPEATS = 256
MAX_DEPTH = 40

_FORCED = "regex:"
_REGEX_MARKS = frozenset("\\()|^$+")
_GLOB_MARKS = frozenset("*?[]{}")
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": frozenset(string.digits), "w": _WORD, "s": frozenset(string.whitespace)}


def spelling(text: str) -> Spelling:
    """How a pattern is read. What starts with ".*" or holds one of \\ ( ) | ^ $ + is a regex."""
    if text.startswith((_FORCED, ".*")) or _REGEX_MARKS & set(text):
        return "regex"
    return "glob" if _GLOB_MARKS & set(text) else "name"


# --- the tree of a pattern -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Char:
    """One character out of a set, or out of all others."""

    chars: frozenset[str]
    negated: bool = False


@dataclass(frozen=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    item: _Node
    low: int
    high: int | None


@dataclass(frozen=True)
class _Edge:
    """Holds between two characters: "^" the start, "$" the end, "b" a word boundary, "B" none."""

    kind: str


_Node = _Char | _Sequence | _Choice | _Repeat | _Edge

_ANY = _Repeat(_Char(frozenset("\n"), negated=True), 0, None)
_SUFFIX = _Choice((_Sequence(()), _Sequence((_ANY, _Char(frozenset("."))))))


class _Reader:
    """A cursor over the text of one pattern. The two grammars below share it."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    def peek(self, ahead: int = 1) -> str:
        return self.text[self.position : self.position + ahead]

    def take(self, expected: str = "") -> str:
        char = self.peek(len(expected) or 1)
        if not char or (expected and char != expected):
            self.fail(f"{expected or 'more text'} is missing")
        self.position += len(char)
        return char

    def accept(self, expected: str) -> bool:
        found = self.peek(len(expected)) == expected
        self.position += len(expected) * found
        return found

    def fail(self, why: str) -> None:
        raise ConfigError(
            f"the pattern {self.text!r} cannot be read: {why} at character {self.position + 1}",
            expected="a name, a glob with * ? {a,b} [0-3], or a regular expression without "
            "look-arounds and back references",
        )

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"more than {MAX_DEPTH} groups within each other")

    def set_of_chars(self) -> _Char:
        """What follows "[", up to and with the "]"."""
        negated = self.accept("^") or self.accept("!")
        chars: set[str] = set()
        first = True
        while first or self.peek() != "]":
            low = self._member()
            if len(low) == 1 and self.peek() == "-" and self.peek(2) != "-]":
                self.take("-")
                high = self._member()
                if len(high) != 1 or min(high) < min(low):
                    self.fail("a bad range of characters")
                low = frozenset(map(chr, range(ord(min(low)), ord(min(high)) + 1)))
            chars |= low
            first = False
        self.take("]")
        return _Char(frozenset(chars), negated)

    def _member(self) -> frozenset[str]:
        char = self.take()
        if char != "\\":
            return frozenset(char)
        char = self.take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            self.fail(f"\\{char} is not known")
        return frozenset(char)


# --- globs ---------------------------------------------------------------------------------------


def _read_glob(reader: _Reader, ends: str = "") -> _Node:
    items: list[_Node] = []
    while (char := reader.peek()) and char not in ends:
        reader.take()
        if char == "*":
            items += [] if items[-1:] == [_ANY] else [_ANY]
        elif char == "?":
            items.append(_Char(frozenset(".\n"), negated=True))
        elif char == "[":
            items.append(_numbers(reader) or reader.set_of_chars())
        elif char == "{":
            reader.deeper()
            choices = [_read_glob(reader, ",}")]
            while reader.accept(","):
                choices.append(_read_glob(reader, ",}"))
            reader.take("}")
            reader.depth -= 1
            items.append(_Choice(tuple(choices)))
        elif char in "]}":
            reader.fail(f"an unmatched {char}")
        else:
            items.append(_Char(frozenset(char)))
    return _Sequence(tuple(items))


def _numbers(reader: _Reader) -> _Node | None:
    """[0-13,20]: whole numbers; None where the brackets hold something else."""
    body, bracket, _ = reader.text[reader.position :].partition("]")
    if not bracket or not body or set(body) - set("0123456789-,"):
        return None
    numbers: list[int] = []
    for part in body.split(","):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            reader.fail(f"{part!r} is not a range of numbers")
        first, last = int(low), int(high or low)
        if not 0 <= last - first < MAX_REPEATS - len(numbers):
            reader.fail(f"{part!r} holds no number, or more than {MAX_REPEATS}")
        numbers += range(first, last + 1)
    reader.position += len(body) + 1
    return _Choice(tuple(_literal(str(n)) for n in numbers))


def _literal(text: str) -> _Sequence:
    return _Sequence(tuple(_Char(frozenset(c)) for c in text))


# --- regular expressions -------------------------------------------------------------------------


def _read_choice(reader: _Reader) -> _Node:
    choices = [_read_sequence(reader)]
    while reader.accept("|"):
        choices.append(_read_sequence(reader))
    return choices[0] if len(choices) == 1 else _Choice(tuple(choices))


def _read_sequence(reader: _Reader) -> _Node:
    items: list[_Node] = []
    while (char := reader.peek()) and char not in "|)":
        items.append(_read_quantified(reader, _read_atom(reader)))
    return _Sequence(tuple(items))


def _read_atom(reader: _Reader) -> _Node:
    char = reader.take()
    if char == "(":
        if reader.peek() == "?" and not reader.accept("?:"):
            reader.fail(f"({reader.peek(3)} is not supported")
        reader.deeper()
        inner = _read_choice(reader)
        reader.take(")")
        reader.depth -= 1
        return inner
    if char == "[":
        return reader.set_of_chars()
    if char == ".":
        return _Char(frozenset("\n"), negated=True)
    if char in "^$":
        return _Edge(char)
    if char == "\\":
        return _read_escape(reader)
    if char in "*+?":
        reader.fail(f"nothing to repeat before {char}")
    return _Char(frozenset(char))


def _read_escape(reader: _Reader) -> _Node:
    char = reader.take()
    if char.lower() in _CLASSES:
        return _Char(_CLASSES[char.lower()], negated=char.isupper())
    if char in "bB":
        return _Edge(char)
    if char in "AZz":
        return _Edge("^" if char == "A" else "$")
    if char.isalnum():
        reader.fail(f"\\{char} is not supported")
    return _Char(frozenset(char))


def _read_quantified(reader: _Reader, item: _Node) -> _Node:
    bounds: tuple[int, int | None] | None = None
    if reader.accept("*"):
        bounds = 0, None
    elif reader.accept("+"):
        bounds = 1, None
    elif reader.accept("?"):
        bounds = 0, 1
    elif reader.peek() == "{":
        bounds = _counts(reader)
    if bounds is None:
        return item
    if isinstance(item, _Edge):
        reader.fail("an edge cannot be repeated")
    reader.accept("?")  # lazy or greedy: the same paths match as a whole
    if reader.peek() and reader.peek() in "*+?":
        reader.fail("a second quantifier")
    return _Repeat(item, *bounds)


def _counts(reader: _Reader) -> tuple[int, int | None] | None:
    """{2}, {1,}, {,3} or {1,3}; None where the brace is an ordinary character, as in `re`."""
    body, brace, _ = reader.text[reader.position + 1 :].partition("}")
    low, comma, high = body.partition(",")
    if not brace or not (low or high) or any(set(n) - set(string.digits) for n in (low, high)):
        return None
    reader.position += len(body) + 2
    least = int(low or 0)
    most = (int(high) if high else None) if comma else least
    if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
        reader.fail(f"{{{body}}} is out of range")
    return least, most


def _read_regex(text: str) -> tuple[_Node, list[_Node]]:
    """The tree, and the trees of leading negative look-aheads."""
    reader, refused = _Reader(text), []
    if text.startswith("^(?!"):
        reader.take("^")
    while reader.accept("(?!"):
        refused.append(_Sequence((_read_choice(reader), _ANY)))
        reader.take(")")
    tree = _read_choice(reader)
    if reader.peek():
        reader.fail("an unmatched )")
    if refused and isinstance(tree, _Choice):
        reader.fail("alternatives beside a look-ahead, which need a group,")
    return tree, refused


# --- the automaton -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Automaton:
    """States that eat a character, and states that move on for free, perhaps only at an edge."""

    eats: dict[int, tuple[_Char, int]] = field(default_factory=dict)
    moves: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    size: int = 1  # state 0 is the end

    def add(self, node: _Node, then: int) -> int:
        """Append the states of `node`, which go on to state `then`; returns their first state."""
        if isinstance(node, _Sequence):
            for item in reversed(node.items):
                then = self.add(item, then)
            return then
        if isinstance(node, _Choice):
            return self._free([("", self.add(item, then)) for item in node.items])
        if isinstance(node, _Edge):
            return self._free([(node.kind, then)])
        if isinstance(node, _Repeat):
            return self._repeat(node, then)
        state = self._new()
        self.eats[state] = node, then
        return state

    def _repeat(self, node: _Repeat, then: int) -> int:
        if node.high is None:
            loop = self._free([("", then)])
            self.moves[loop].append(("", self.add(node.item, loop)))
            then = loop
        for _ in range((node.high or node.low) - node.low):
            then = self._free([("", then), ("", self.add(node.item, then))])
        for _ in range(node.low):
            then = self.add(node.item, then)
        return then

    def _free(self, moves: list[tuple[str, int]]) -> int:
        state = self._new()
        self.moves[state] = moves
        return state

    def _new(self) -> int:
        if self.size >= MAX_STATES:
            raise ConfigError(f"a pattern is too large: more than {MAX_STATES} states")
        self.size += 1
        return self.size - 1


class _Machine:
    """Walks an automaton with the set of its states; steps already seen are remembered."""

    def __init__(self, tree: _Node) -> None:
        self.automaton = _Automaton()
        self.first = self.automaton.add(tree, 0)
        self.seen: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}

    def matches(self, path: str) -> bool:
        states = self._close({self.first}, "", path[:1])
        for i, char in enumerate(path):
            states = self._step(states, char, path[i + 1 : i + 2])
            if not states:
                return False
        return 0 in states

    def _step(self, states: frozenset[int], char: str, following: str) -> frozenset[int]:
        key = states, char, following
        if key not in self.seen:
            if len(self.seen) > 10_000:
                self.seen.clear()
            eats = self.automaton.eats
            eaten = (eats[s] for s in states if s in eats)
            moved = {then for test, then in eaten if (char in test.chars) != test.negated}
            self.seen[key] = self._close(moved, char, following)
        return self.seen[key]

    def _close(self, states: set[int], before: str, after: str) -> frozenset[int]:
        """All states reached without a character, between the characters `before` and `after`."""
        boundary = (before in _WORD) != (after in _WORD)
        holds = {"": True, "^": not before, "$": not after, "b": boundary, "B": not boundary}
        reached, waiting = set(states), list(states)
        while waiting:
            for edge, then in self.automaton.moves.get(waiting.pop(), ()):
                if holds[edge] and then not in reached:
                    reached.add(then)
                    waiting.append(then)
        if len(reached) > MAX_ACTIVE:
            raise ConfigError(
                f"a pattern is too ambiguous: more than {MAX_ACTIVE} readings at once"
            )
        return frozenset(reached)


# --- what others use -----------------------------------------------------------------------------


class Pattern:
    """A compiled pattern.

    Args:
        text: the pattern in any of the three spellings.
        suffix: for a regex: whether it may also match the end of a path after a dot, as PEFT reads
            the keys of rank_pattern. Names and globs always do.

    Raises:
        ConfigError: the text cannot be read, or is not a bounded pattern; it says where and why.
    """

    def __init__(self, text: str, *, suffix: bool = False) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"{text!r} is not a name or a pattern", expected="text")
        if not text or len(text) > MAX_LENGTH:
            raise ConfigError(f"a pattern holds 1 to {MAX_LENGTH} characters, not {len(text)}")
        self.text, self.spelling = text, spelling(text)
        refused: list[_Node] = []
        if self.spelling == "regex":
            tree, refused = _read_regex(text.removeprefix(_FORCED))
        else:
            tree = _read_glob(_Reader(text)) if self.spelling == "glob" else _literal(text)
        if suffix or self.spelling != "regex":
            tree = _Sequence((_SUFFIX, tree))
        self._machine = None if self.spelling == "name" else _Machine(tree)
        self._refused = [_Machine(tree) for tree in refused]

    def matches(self, path: str) -> bool:
        """Whether the pattern takes this path."""
        if self._machine is None:
            return path == self.text or path.endswith("." + self.text)
        return self._machine.matches(path) and not any(m.matches(path) for m in self._refused)

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"


@functools.lru_cache(maxsize=4096)
def compiled(text: str, suffix: bool = False) -> Pattern:
    """`Pattern(text, suffix=suffix)`, remembered."""
    return Pattern(text, suffix=suffix)


def pattern_value(patterns: Mapping[str, Value], path: str) -> Value | None:
    r"""The value of the first key that takes `path`, as PEFT reads rank_pattern and alpha_pattern.

    PEFT's rule is `(.*\.)?(key)$`: a key takes the path or its end after a dot. None: no key does.
    """
    for key, value in patterns.items():
        if compiled(key, suffix=True).matches(path):
            return value
    return None


def unmatched_patterns(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The keys that decide no path: they match nothing, or earlier keys take all they match."""
    keys = list(patterns)
    used = {pattern_value({key: key for key in keys}, path) for path in paths}
    return [key for key in keys if key not in used]

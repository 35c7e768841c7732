r"""Patterns over module paths, matched in time linear in the path. No user text ever reaches `re`.

Three spellings, told apart by their characters (see `spelling`):

    name     q_proj, self_attn.q_proj       the whole path, or its end after a dot
    glob     layers.[0-3].*.{q,v}_proj      likewise; * any run of characters, ? one character but
                                            a dot, {a,b} alternatives, [qv] characters,
                                            [0-13,20] whole numbers
    regex    .*\.layers\.\d+\.(q|v)_proj    the whole path; PEFT's spelling, read from its files.
                                            A leading "regex:" forces this reading.

Python's `re` backtracks: "(\w+\.?)+X" on a path of 49 characters runs for seconds, and adapter
files come from strangers. Here a pattern becomes an automaton (`methods.automaton`) that cannot be
slow. What is not regular (back references, look-arounds but a leading negative look-ahead) is
refused.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

from lorica.errors import ConfigError
from lorica.methods.automaton import WORD, Char, Choice, Edge, Machine, Node, Repeat, Sequence

Value = TypeVar("Value")
Spelling = Literal["name", "glob", "regex"]

MAX_LENGTH = 4096
MAX_REPEATS = 256
MAX_DEPTH = 40

_FORCED = "regex:"
_REGEX_MARKS = frozenset("\\()|^$+")
_GLOB_MARKS = frozenset("*?[]{}")
_CLASSES = {"d": frozenset(string.digits), "w": WORD, "s": frozenset(string.whitespace)}


def spelling(text: str) -> Spelling:
    """How a pattern is read. What starts with ".*" or holds one of \\ ( ) | ^ $ + is a regex."""
    if text.startswith((_FORCED, ".*")) or _REGEX_MARKS & set(text):
        return "regex"
    return "glob" if _GLOB_MARKS & set(text) else "name"


_ANY = Repeat(Char(frozenset("\n"), negated=True), 0, None)
_SUFFIX = Choice((Sequence(()), Sequence((_ANY, Char(frozenset("."))))))


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

    def set_of_chars(self) -> Char:
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
        return Char(frozenset(chars), negated)

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


def _read_glob(reader: _Reader, ends: str = "") -> Node:
    items: list[Node] = []
    while (char := reader.peek()) and char not in ends:
        reader.take()
        if char == "*":
            items += [] if items[-1:] == [_ANY] else [_ANY]
        elif char == "?":
            items.append(Char(frozenset(".\n"), negated=True))
        elif char == "[":
            items.append(_numbers(reader) or reader.set_of_chars())
        elif char == "{":
            reader.deeper()
            choices = [_read_glob(reader, ",}")]
            while reader.accept(","):
                choices.append(_read_glob(reader, ",}"))
            reader.take("}")
            reader.depth -= 1
            items.append(Choice(tuple(choices)))
        elif char in "]}":
            reader.fail(f"an unmatched {char}")
        else:
            items.append(Char(frozenset(char)))
    return Sequence(tuple(items))


def _numbers(reader: _Reader) -> Node | None:
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
    return Choice(tuple(_literal(str(n)) for n in numbers))


def _literal(text: str) -> Sequence:
    return Sequence(tuple(Char(frozenset(c)) for c in text))


# --- regular expressions -------------------------------------------------------------------------


def _read_choice(reader: _Reader) -> Node:
    choices = [_read_sequence(reader)]
    while reader.accept("|"):
        choices.append(_read_sequence(reader))
    return choices[0] if len(choices) == 1 else Choice(tuple(choices))


def _read_sequence(reader: _Reader) -> Node:
    items: list[Node] = []
    while (char := reader.peek()) and char not in "|)":
        items.append(_read_quantified(reader, _read_atom(reader)))
    return Sequence(tuple(items))


def _read_atom(reader: _Reader) -> Node:
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
        return Char(frozenset("\n"), negated=True)
    if char in "^$":
        return Edge(char)
    if char == "\\":
        return _read_escape(reader)
    if char in "*+?":
        reader.fail(f"nothing to repeat before {char}")
    return Char(frozenset(char))


def _read_escape(reader: _Reader) -> Node:
    char = reader.take()
    if char.lower() in _CLASSES:
        return Char(_CLASSES[char.lower()], negated=char.isupper())
    if char in "bB":
        return Edge(char)
    if char in "AZz":
        return Edge("^" if char == "A" else "$")
    if char.isalnum():
        reader.fail(f"\\{char} is not supported")
    return Char(frozenset(char))


def _read_quantified(reader: _Reader, item: Node) -> Node:
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
    if isinstance(item, Edge):
        reader.fail("an edge cannot be repeated")
    reader.accept("?")  # lazy or greedy: the same paths match as a whole
    if reader.peek() and reader.peek() in "*+?":
        reader.fail("a second quantifier")
    return Repeat(item, *bounds)


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


def _read_regex(text: str) -> tuple[Node, list[Node]]:
    """The tree, and the trees of leading negative look-aheads."""
    reader, refused = _Reader(text), []
    if text.startswith("^(?!"):
        reader.take("^")
    while reader.accept("(?!"):
        refused.append(Sequence((_read_choice(reader), _ANY)))
        reader.take(")")
    tree = _read_choice(reader)
    if reader.peek():
        reader.fail("an unmatched )")
    if refused and isinstance(tree, Choice):
        reader.fail("alternatives beside a look-ahead, which need a group,")
    return tree, refused


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
        refused: list[Node] = []
        if self.spelling == "regex":
            tree, refused = _read_regex(text.removeprefix(_FORCED))
        else:
            tree = _read_glob(_Reader(text)) if self.spelling == "glob" else _literal(text)
        if suffix or self.spelling != "regex":
            tree = Sequence((_SUFFIX, tree))
        self._machine = None if self.spelling == "name" else Machine(tree)
        self._refused = [Machine(tree) for tree in refused]

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

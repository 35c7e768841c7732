"""Regular expressions as automata, matched in time linear in the text.

A tree of nodes becomes a nondeterministic automaton that is walked with the set of all its states
(Thompson 1968, "Regular Expression Search Algorithm"), so that no expression can be slow.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field

from lorica.errors import ConfigError

MAX_STATES = 8192
MAX_ACTIVE = 1024
"""States that may be active at once: what bounds the cost of one character."""

WORD = frozenset(string.ascii_letters + string.digits + "_")
"""The characters of a word, at whose edges there are boundaries."""


@dataclass(frozen=True)
class Char:
    """One character out of a set, or out of all others."""

    chars: frozenset[str]
    negated: bool = False


@dataclass(frozen=True)
class Sequence:
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Edge:
    """Holds between two characters: "^" the start, "$" the end, "b" a word boundary, "B" none."""

    kind: str


Node = Char | Sequence | Choice | Repeat | Edge


@dataclass(eq=False)
class _Automaton:
    """States that eat a character, and states that move on for free, perhaps only at an edge."""

    eats: dict[int, tuple[Char, int]] = field(default_factory=dict)
    moves: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    size: int = 1  # state 0 is the end

    def add(self, node: Node, then: int) -> int:
        """Append the states of `node`, which go on to state `then`; returns their first state."""
        if isinstance(node, Sequence):
            for item in reversed(node.items):
                then = self.add(item, then)
            return then
        if isinstance(node, Choice):
            return self._free([("", self.add(item, then)) for item in node.items])
        if isinstance(node, Edge):
            return self._free([(node.kind, then)])
        if isinstance(node, Repeat):
            return self._repeat(node, then)
        state = self._new()
        self.eats[state] = node, then
        return state

    def _repeat(self, node: Repeat, then: int) -> int:
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


class Machine:
    """Walks an automaton with the set of its states; steps already seen are remembered."""

    def __init__(self, tree: Node) -> None:
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
        boundary = (before in WORD) != (after in WORD)
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

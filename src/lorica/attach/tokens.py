"""Where the rows of chosen tokens lie: an embedding, and all layers that share its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorica.attach.survey import LINEAR, clean, ends, survey
from lorica.base.ends import end_layer
from lorica.errors import TargetError, nearest
from lorica.methods.method import Method
from lorica.methods.tokens import Tokens

Choice = Sequence[int] | Mapping[str, Sequence[int]]
"""Tokens of the input embedding, or those of each named layer."""

SETTING = "trainable_token_indices"


@dataclass(frozen=True)
class Rows:
    """The chosen rows of one weight.

    Attributes:
        name: of the layer in the setting; empty where the input embedding is meant.
        path: that layer.
        indices: the tokens, ascending.
        places: the layers that are called with this very weight; the first of them holds the rows.
    """

    name: str
    path: str
    indices: tuple[int, ...]
    places: tuple[str, ...]


def rows_of(model: nn.Module, choice: Choice) -> list[Rows]:
    """The weights of which tokens are chosen.

    Raises:
        TargetError: there is no such embedding, a token is beyond its vocabulary, or two names mean
            one weight; all problems at once.
    """
    if not choice:
        return []
    found, problems = list[Rows](), list[str]()
    seen: dict[int, str] = {}
    modules = {clean(path): module for path, module in model.named_modules()}
    for name, path in _named(model, modules, choice, problems):
        indices = sorted(choice[name] if isinstance(choice, Mapping) else choice)
        weight = modules[path]._parameters.get("weight")
        if weight is None:
            problems.append(f"{path} has no weight of its own")
            continue
        if (other := seen.setdefault(id(weight), path)) != path:
            problems.append(f"{path} shares its weight with {other}: name one of them")
        problems += [
            f"{path} has {len(weight):,} tokens; there is no token {index}"
            for index in indices
            if index >= len(weight)
        ][:3]
        found.append(Rows(name, path, tuple(indices), _called(model, modules, path)))
    if problems:
        raise TargetError(
            f"{SETTING} cannot be used",
            problems=problems,
            mend="enlarge the base's vocabulary first; or name the embedding, as in {embed_tokens: "
            "[...]}",
        )
    return found


def add_rows(
    model: nn.Module, choice: Choice, places: dict[str, tuple[nn.Module, str | None, Method]]
) -> None:
    """Add the places of the rows to those of an adapter.

    Raises:
        TargetError: as `rows_of` does; or one of these layers is adapted already.
    """
    modules = {clean(path): module for path, module in model.named_modules()}
    for rows in rows_of(model, choice):
        if taken := [path for path in rows.places if path in places]:
            raise TargetError(
                f"{' and '.join(taken)}: adapted as a whole, and {SETTING} would train rows of it",
                mend="take it out of target_modules and modules_to_save, or take the tokens out",
            )
        for path in rows.places:
            tie = None if path == rows.places[0] else rows.places[0]
            places[path] = modules[path], None, Tokens(rows.indices, tie)


def _named(
    model: nn.Module, modules: Mapping[str, nn.Module], choice: Choice, problems: list[str]
) -> list[tuple[str, str]]:
    """Names of the setting, and the layers that they mean."""
    if not isinstance(choice, Mapping):
        embedding = end_layer(model, "get_input_embeddings")
        path = next((path for path, module in modules.items() if module is embedding), None)
        problems += [] if path else ["the model does not say which is its input embedding"]
        return [("", path)] if path else []
    found: list[tuple[str, str]] = []
    layers = {p: m for p, m in modules.items() if isinstance(m, (nn.Embedding, *LINEAR[:1]))}
    for name in choice:
        paths = [path for path in layers if ends(path, name)]
        if len(paths) != 1:
            near = nearest(name, {path.rpartition(".")[2] for path in layers})
            hint = f"; did you mean {near!r}?" if near and not paths else ""
            problems.append(f"{name!r} means {len(paths)} layers, not one{hint}")
        found += [(name, path) for path in paths[:1]]
    return found


def _called(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> tuple[str, ...]:
    """The layers with this weight, but for those that are there in name only."""
    weight, places = modules[path]._parameters["weight"], survey(model).places
    sharers = [p for p, m in modules.items() if m._parameters.get("weight") is weight]
    called = [p for p in (path, *sharers) if p in places and not places[p].refusal]
    return tuple(dict.fromkeys(called))

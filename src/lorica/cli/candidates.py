"""The candidates of a search as settings, and what can be told of them before any trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorica.cli.start import source_of
from lorica.config import Layer, Resolved, TrainSettings, resolve
from lorica.config.text import yaml_text
from lorica.errors import ConfigError
from lorica.methods import WORDS
from lorica.methods.method import Method
from lorica.search.samplers import fixed_points
from lorica.search.space import Choices, Point, Space, name_of, read_space, values_of


class Candidates:
    """The settings of every candidate: those of the run, and over them its own.

    Args:
        settings: of the run, with its section `search`.

    Raises:
        ConfigError: the section cannot be searched, or a value in it can never work.
    """

    def __init__(self, settings: Resolved) -> None:
        self.settings = settings
        self.space = _space_of(settings)
        self._check_values()

    def resolved(self, point: Mapping[str, Any]) -> Resolved:
        """All settings of a candidate, as a run of its own.

        Raises:
            ConfigError: they do not go together.
        """
        own, values = self.settings, self.settings.values
        kept = {
            key: value
            for key, value in values.items()
            if own.origins[key] != "default" and key not in ("search", "output_dir")
        }
        layer = Layer("settings", kept, {key: own.origins[key] for key in kept})
        rank = getattr(own.method, "r", None)
        chosen = Layer("search", values_of(point, rank))
        return resolve(layer, chosen, methods=WORDS)

    def made(self, point: Point) -> tuple[Method, TrainSettings]:
        """The method of a candidate and how it trains."""
        found = self.resolved(point)
        return found.method, found.train

    def with_settings(self, settings: Resolved) -> Candidates:
        """The same candidates of a run whose data has decided something."""
        made = object.__new__(Candidates)
        made.settings, made.space = settings, self.space
        return made

    def by_size(self) -> list[Point]:
        """Points of the space, those of the most memory first: all of a grid, else the corners."""
        points = fixed_points(self.space, self.settings.train.seed) or self._corners()
        return sorted(points, key=lambda point: -float(point.get("r", 0) or 0))

    def _corners(self) -> list[Point]:
        """The first choice and the largest number of everything; and each other choice of it."""
        first = {a.key: a.values[0] if isinstance(a, Choices) else a.high for a in self.space.axes}
        found = [first]
        for axis in self.space.axes:
            ends = axis.values[1:] if isinstance(axis, Choices) else (axis.at(0.0),)
            found += [{**first, axis.key: value} for value in ends]
        return [self.space.settle(point) for point in found]

    def _check_values(self) -> None:
        """Raises ConfigError for values that work in no candidate."""
        wrong: dict[tuple[str, str], list[str]] = {}
        right: set[tuple[str, str]] = set()
        for point in (*self._corners(), *(fixed_points(self.space, 0) or ())):
            places = [(key, yaml_text(value)) for key, value in point.items()]
            try:
                self.resolved(point)
                right.update(places)
            except ConfigError as error:
                for place in places:
                    wrong.setdefault(place, []).extend(error.problems)
        never = {place: texts for place, texts in wrong.items() if place not in right}
        problems = list(dict.fromkeys(_about(place, texts) for place, texts in never.items()))
        if problems:
            raise ConfigError("the search holds values that can never work", problems=problems)


def _about(place: tuple[str, str], texts: Iterable[str]) -> str:
    key, value = place
    texts = [text.removeprefix("search: ") for text in texts]
    own = next((text for text in texts if text.startswith(key)), next(iter(texts), ""))
    return own if own.startswith(key) else f"{key}: {value}: {own}"


def _space_of(settings: Resolved) -> Space:
    """The space of a run.

    Raises:
        ConfigError: there is none, or the run cannot be searched.
    """
    run, origins = settings.run, settings.origins
    if run.search is None:
        raise ConfigError(
            "there is nothing to search: the settings have no section search",
            expected="in the settings file, for example  search: {r: [4, 8, 16, 32]}",
            mend="lorica train trains with one value for each setting",
        )
    problems = [
        f"{origins[key]}: {key} does not go with a search"
        for key in ("stages", "adapters", "seeds", "on_adapter")
        if getattr(run, key) is not None
    ]
    if settings.below:
        problems.append(f"{origins['method']}: several methods at once do not go with a search")
    if problems:
        raise ConfigError("this cannot be searched", problems=problems)
    given = {key: where for key, where in origins.items() if where != "default"}
    space = read_space(
        run.search,
        methods=WORDS,
        default_method=settings.method.kind,
        given={k: v for k, v in given.items() if not v.startswith(("rule", "init_adapter"))},
        origin=origins["search"],
    )
    _check_source(settings, space)
    return space


def _check_source(settings: Resolved, space: Space) -> None:
    """Raises ConfigError where candidates cannot begin from the adapter of `init_adapter`."""
    if settings.run.init_adapter is None:
        return
    free = TrainSettings.model_fields
    if fixed := [key for key in space.keys if key not in free and "dropout" not in key]:
        raise ConfigError(
            f"{settings.origins['init_adapter']}: every candidate begins with the tensors of "
            f"{settings.run.init_adapter}, which decide about {', '.join(fixed)}",
            expected="a search over how it trains on: learning_rate, weight_decay, dropout ...",
            mend=f"take {', '.join(fixed)} out of the section search, or take init_adapter out",
        )
    source_of(settings)


def label_of(point: Point) -> str:
    """A candidate in words; "the settings as they are" for one that chooses nothing."""
    return name_of(point) or "the settings as they are"

"""What a search may choose: the `search:` section of a settings file.

    search:
      r: [4, 8, 16, 32]                                   a list: choices
      learning_rate: {low: 1e-4, high: 1e-3, log: true}   a range
      lora_alpha: [16, 2r]                                2r: twice the rank, whatever that is
      sampler: random                                     how the search goes: `SearchSettings`

A candidate is a point: name of a setting -> value. What a method does not have is left out of its
points, so that `method: [lora, ia3]` may stand beside `r`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from lorica.config.names import ALIASES
from lorica.config.settings import (
    PathText,
    Preset,
    Setting,
    Settings,
    Union,
    known_settings,
    method_settings,
)
from lorica.config.text import yaml_text
from lorica.config.words import Expects, shown
from lorica.errors import ConfigError, nearest

Point = dict[str, Any]
"""A candidate's own settings: name -> value as YAML has it."""

SHORT = {"init": "init_lora_weights", "dropout": "lora_dropout"}
"""Names that are taken in the section beside those of settings and their aliases."""

TRAINING = (
    "learning_rate",
    "weight_decay",
    "warmup_ratio",
    "warmup_steps",
    "lr_scheduler_type",
    "decay_ratio",
    "max_grad_norm",
    "loraplus_lr_ratio",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
"""Settings of training that candidates may differ in: with these all see the same records in the
same order, in as many steps.
"""

_MULTIPLE = re.compile(r"(\d*\.?\d*)\s*\*?\s*r")
_RANGE = {"low", "high", "log", "num"}


class SearchSettings(Settings):
    """How a search goes.

    Raises:
        ConfigError: values of a wrong type, out of range or unknown; all at once.
    """

    sampler: Literal["grid", "random", "tpe", "gp", "qmc"] | None = Field(
        default=None,
        description="how candidates are found: every point of the lists, by chance, or by a "
        "sampler of Optuna; null: grid where the section holds lists alone, else random",
    )
    candidates: int | None = Field(
        default=None, ge=1, le=10_000, description="how many there are; null: all of a grid, or 16"
    )
    at_once: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="how many train together; null: as many as memory has room for",
    )
    rungs: Annotated[
        tuple[float, ...], Strict(False), Expects("a list of shares of the run, each below 1")
    ] = Field(
        default=(0.125, 0.25),
        description="shares of a run after which candidates are compared; []: all train to the end",
    )
    keep: float = Field(
        default=0.5, gt=0, lt=1, description="share of the candidates of a rung that go on"
    )
    hopeless: bool = Field(
        default=True,
        description="end a candidate whose evaluation loss cannot reach the best any more, even if "
        "it went on to fall as fast as it does now",
    )
    standard_errors: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="how far, in standard errors of the paired difference, the chosen candidate "
        "may lie above the best one",
    )
    spectrum: bool = Field(
        default=True,
        description="cut the largest rank that was trained to each smaller one and score it",
    )
    storage: PathText | None = Field(
        default=None,
        description="the study, which several machines may share: a file, or an address that "
        "Optuna takes; null: study.db of the output folder",
    )

    def contradictions(self) -> list[str]:
        if any(not 0 < share < 1 for share in self.rungs) or list(self.rungs) != sorted(
            set(self.rungs)
        ):
            return [
                f"rungs is {list(self.rungs)}; expected rising shares of a run, above 0 and below 1"
            ]
        return []


@dataclass(frozen=True)
class Choices:
    """A setting that takes one of some values."""

    key: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """The values as text, by which a study knows them."""
        return [yaml_text(value) for value in self.values]


@dataclass(frozen=True)
class Range:
    """A setting that takes a number from `low` to `high`, drawn on a logarithmic scale with `log`.

    Attributes:
        whole: whole numbers only.
        num: how many points of it a grid takes; None where it was not said.
    """

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    num: int | None = None

    def at(self, share: float) -> float | int:
        """The value at a share of the way from low to high."""
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        value = min(self.high, max(self.low, value))
        return round(value) if self.whole else float(f"{value:.4g}")

    def points(self) -> list[float | int]:
        """Those of a grid."""
        number = self.num or 1
        return list(dict.fromkeys(self.at(i / max(1, number - 1)) for i in range(number)))


@dataclass(frozen=True)
class Space:
    """Everything that candidates may differ in.

    Attributes:
        axes: the settings, in the order in which they were written.
        methods: word -> the settings that it takes; of the words that `method` may have.
        how: how the search goes.
        default_method: of candidates where the method is none of the axes.
    """

    axes: tuple[Choices | Range, ...]
    methods: Mapping[str, frozenset[str]]
    how: SearchSettings
    default_method: str

    @property
    def keys(self) -> list[str]:
        return [axis.key for axis in self.axes]

    @property
    def sampler(self) -> str:
        return self.how.sampler or ("grid" if self.is_grid else "random")

    @property
    def is_grid(self) -> bool:
        """Whether its points can be counted."""
        return all(isinstance(axis, Choices) or axis.num for axis in self.axes)

    def settle(self, point: Mapping[str, Any]) -> Point:
        """The point without what its method does not take."""
        word = point.get("method", self.default_method)
        taken = self.methods.get(word)
        if taken is None:
            return dict(point)
        return {k: v for k, v in point.items() if k == "method" or k in TRAINING or k in taken}


def values_of(point: Mapping[str, Any], rank: Any) -> Point:
    """A point as settings: multiples of the rank as numbers.

    Args:
        rank: `r` of the run, for a point that has none of its own.
    """
    r = point.get("r", rank)
    return {
        key: _number(value, r) if key == "lora_alpha" else value for key, value in point.items()
    }


def _number(value: Any, r: Any) -> Any:
    factor = _factor(value)
    if factor is None:
        return value
    found = factor * r
    return int(found) if found == int(found) else found


def _factor(value: Any) -> float | None:
    """2 of "2r"; None where it is no multiple of the rank."""
    match = _MULTIPLE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    try:
        return float(match.group(1) or 1)
    except ValueError:  # a lone point
        return None


def name_of(point: Mapping[str, Any]) -> str:
    """A candidate in words: its own settings."""
    words = {"r": "rank", "learning_rate": "lr", "lora_alpha": "alpha", "target_modules": "targets"}
    parts = [
        f"{value}" if key == "method" else f"{words.get(key, key)} {_short(value)}"
        for key, value in point.items()
    ]
    return ", ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_space(
    section: Any,
    *,
    methods: Mapping[str, Any],
    default_method: str,
    given: Mapping[str, str],
    origin: str = "search",
) -> Space:
    """Check a section.

    Args:
        methods: the methods there are, as `resolve` takes them.
        default_method: of the run.
        given: settings beside the section that have an origin other than a default -> that.
        origin: where the section is, for messages.

    Raises:
        ConfigError: everything that is wrong with it, each with the nearest thing that exists.
    """
    known = known_settings(methods)
    problems: list[str] = []
    if not isinstance(section, Mapping) or not section:
        raise ConfigError(
            f"{origin}: there is nothing to search",
            expected="a mapping such as {r: [4, 8, 16], learning_rate: [1e-4, 3e-4]}",
        )
    own = {key: value for key, value in section.items() if key in SearchSettings.model_fields}
    how = SearchSettings()
    try:
        how = SearchSettings(**own)
    except ConfigError as error:
        problems += error.problems
    axes: dict[str, Choices | Range] = {}
    for name, value in section.items():
        if name in own:
            continue
        key = _key(str(name), known)
        if problem := _problem(str(name), key, value, known, axes, given):
            problems.append(problem)
        elif key is not None:
            axes[key] = _axis(key, value, known[key])
    problems += _together(axes, own, how, methods, searched=len(section) - len(own))
    if problems:
        raise ConfigError(
            "the search cannot be run", problems=[f"{origin}: {text}" for text in problems]
        )
    method = axes.get("method")
    words = method.values if isinstance(method, Choices) else (default_method,)
    taken = {str(w): _taken(methods[w]) for w in words if isinstance(w, str) and w in methods}
    return Space(tuple(axes.values()), taken, how, default_method)


def _key(name: str, known: Mapping[str, Setting]) -> str | None:
    for spelling in (name, name.replace("-", "_")):
        key = SHORT.get(spelling) or ALIASES.get(spelling, spelling)
        if key in known:
            return key
    return None


def _problem(
    name: str,
    key: str | None,
    value: Any,
    known: Mapping[str, Setting],
    axes: Mapping[str, Any],
    given: Mapping[str, str],
) -> str | None:
    """What is wrong with one entry of the section."""
    if key is None:
        near = nearest(name, [*SearchSettings.model_fields, *known, *SHORT, *ALIASES])
        return f"{name} is not a setting" + (f"; did you mean {near}?" if near else "")
    if key != "method" and known[key].group == "run":
        return f"{name} is the same for all candidates; put it beside `search:`"
    if known[key].group == "train" and key not in TRAINING:
        return (
            f"{name} is the same for all candidates, which see the same records in the same order; "
            f"put it beside `search:`. Of training they may differ in {', '.join(TRAINING)}"
        )
    if key in axes:
        return f"{name} is given twice, as {key}"
    if key in given and key != "method":
        return f"{name} is set beside the section too ({given[key]}), which would have no effect"
    if isinstance(value, list | tuple):
        return None if value else f"{name} is an empty list"
    if not isinstance(value, Mapping):
        return (
            f"{name} is {shown(value)}; expected a list of choices or a range {{low: 1, high: 9}}; "
            "a single value is put beside `search:`"
        )
    return _range_problem(name, value, known[key])


def _range_problem(name: str, value: Mapping[str, Any], setting: Setting) -> str | None:
    if strange := [key for key in value if key not in _RANGE]:
        near = nearest(str(strange[0]), _RANGE)
        hint = f"; did you mean {near}?" if near else ""
        return f"{name}: {strange[0]} is no part of a range (low, high, log, num){hint}"
    if missing := [key for key in ("low", "high") if key not in value]:
        return f"{name}: {' and '.join(missing)} of the range is missing"
    if not {int, float} & {*setting.kinds}:
        return f"{name} takes {setting.expected}, which has no range; give a list"
    low, high = value["low"], value["high"]
    if any(type(end) not in (int, float) for end in (low, high)) or not low < high:
        return f"{name}: the range from {shown(low)} to {shown(high)} is none"
    if value.get("log") and low <= 0:
        return f"{name}: a logarithmic range begins above 0, and not at {low}"
    if type(value.get("log", False)) is not bool:
        return f"{name}: log is {shown(value['log'])}; expected true or false"
    number = value.get("num")
    if number is not None and (type(number) is not int or not 2 <= number <= 1000):
        return f"{name}: num is {shown(number)}; expected a whole number from 2 to 1,000"
    return None


def _axis(key: str, value: Any, setting: Setting) -> Choices | Range:
    if isinstance(value, Mapping):
        whole = float not in setting.kinds
        how = {"log": bool(value.get("log")), "whole": whole, "num": value.get("num")}
        return Range(key, value["low"], value["high"], **how)
    texts = {yaml_text(one): one for one in value}
    return Choices(key, tuple(texts.values()))


def _together(
    axes: Mapping[str, Choices | Range],
    own: Mapping[str, Any],
    how: SearchSettings,
    methods: Mapping[str, Any],
    *,
    searched: int,
) -> list[str]:
    """What is wrong with the entries together."""
    problems = []
    if searched == 0:
        problems.append("there is no setting to choose, such as r: [4, 8, 16]")
    ranges = [a.key for a in axes.values() if isinstance(a, Range) and not a.num]
    if how.sampler == "grid" and ranges:
        problems.append(
            f"sampler: grid needs lists, and {', '.join(ranges)} is a range; give a list, or num: 4"
        )
    words = axes.get("method")
    for word in words.values if isinstance(words, Choices) else ():
        if not isinstance(word, str) or word not in methods:
            near = nearest(str(word), methods)
            hint = f"; did you mean {near}?" if near else ""
            problems.append(f"method: {shown(word)} is no method{hint}")
    if "standard_errors" in own and math.isnan(how.standard_errors):
        problems.append("standard_errors is no number")
    return problems


def _taken(method: Any) -> frozenset[str]:
    """The settings that a method, or what another name stands for, takes."""
    if isinstance(method, Union):
        return frozenset()
    kind = method.method if isinstance(method, Preset) else method
    return frozenset(setting.key for setting in method_settings(kind.kind, kind))


def choices_of(axes: Sequence[Choices | Range]) -> list[list[Any]]:
    """The points of a grid along each axis."""
    return [list(a.values) if isinstance(a, Choices) else a.points() for a in axes]

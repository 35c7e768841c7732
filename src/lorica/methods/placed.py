"""What methods have in common: plain defaults, and, where they sit on layers, where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lorica.errors import ConfigError
from lorica.methods.method import Layer, setting


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings in one spelling, checked when they are made, and plain answers to what is asked of a
    method.

    Raises:
        ConfigError: a value is out of range; all problems at once.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    """The method in a line, with its paper: what `lorica methods` prints."""
    proposes: ClassVar[Mapping[str, Any]] = {}
    """Settings of training that suit it better than the defaults; what is given instead wins."""
    replaces: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, value in self._canonical().items():
            object.__setattr__(self, name, value)
        if found := self._problems():
            raise ConfigError(f"the settings of {self.kind} cannot be used", problems=found)

    @property
    def dropout(self) -> float:
        return 0.0

    def at(self, path: str) -> Self:
        return self

    def _problems(self) -> list[str]:
        """Values out of range, each sentence beginning with the setting's name."""
        return []

    def _canonical(self) -> dict[str, Any]:
        """One spelling for each value: settings from YAML, flags, Python and files are equal."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Placed(MethodSettings):
    """The settings that choose layers. Names and meaning are PEFT's.

    Raises:
        ConfigError: a value is out of range; all problems at once.
    """

    target_modules: str | tuple[str, ...] = setting(
        "auto",
        "layers to adapt: auto, all-linear, attention, mlp, names or suffixes, or a pattern with * "
        "and {a,b}",
    )
    exclude_modules: str | tuple[str, ...] = setting((), "names, suffixes or patterns to leave out")
    layers_to_transform: str | tuple[int, ...] | None = setting(
        None, "only these layers, by number: 0,3,5 or a range such as 0-3"
    )
    modules_to_save: str | tuple[str, ...] = setting(
        (), "modules trained whole beside the adapter, such as a new head"
    )

    auto: ClassVar[str] = "auto"
    """The choice of layers that target_modules="auto" stands for; see `attach.choices`."""

    def host(self, path: str) -> str:
        """The module that it sits on, where the layer at `path` was chosen."""
        return path

    def over(self, layers: Sequence[Layer]) -> Self:
        """The settings when all layers of the adapter are known."""
        return self

    def decided(self, given: Self) -> str:
        """What `over` has made of the settings that were `given`, where the user should know."""
        return ""

    def _canonical(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("exclude_modules", "modules_to_save", "target_modules", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, list | set | range):
                found[name] = tuple(sorted(value) if isinstance(value, set) else value)
            elif (isinstance(value, str) and name in ("exclude_modules", "modules_to_save")) or (
                isinstance(value, int) and not isinstance(value, bool)
            ):
                found[name] = (value,)
        if hasattr(self, "lora_alpha"):
            found["lora_alpha"] = whole(self.lora_alpha)  # pyright: ignore[reportAttributeAccessIssue]
        return found


def whole(number: Any) -> Any:
    """16.0 as 16, as YAML and files write either."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def scale_problems(name: str, value: object) -> list[str]:
    """Why a value cannot multiply an update."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e4:
        return [f"{name} is {value!r}; it must be more than 0 and at most 10,000"]
    return []


def rank_problems(name: str, value: object) -> list[str]:
    """Why a value cannot be a rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        return [f"{name} is {value!r}; it must be a whole number from 1 to 65,536"]
    return []

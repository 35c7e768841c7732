"""Settings of adapters that train together: what each has for itself, and what is the run's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lorica.attach.handle import Adapter, find
from lorica.config import TrainSettings
from lorica.config.several import OF_THE_RUN
from lorica.errors import ConfigError

Given = TrainSettings | Mapping[Adapter | str, TrainSettings]


def of_the_run(settings: Given | None) -> TrainSettings:
    """The settings by which a run goes: the only ones, or the first, which agree in that."""
    if settings is None or isinstance(settings, TrainSettings):
        return settings or TrainSettings()
    return next(iter(settings.values()), TrainSettings())


def settings_of(
    model: nn.Module, names: Iterable[str], settings: Given
) -> dict[str, TrainSettings]:
    """The settings of each adapter.

    Raises:
        ConfigError: an adapter without settings, settings of none, or values that cannot differ.
    """
    names = list(names)
    if isinstance(settings, TrainSettings):
        return dict.fromkeys(names, settings)
    found = {find(model, key).name: own for key, own in settings.items()}
    problems = [f"{name!r} trains, and has no settings" for name in names if name not in found]
    problems += [
        f"there are settings for {name!r}, which does not train"
        for name in found
        if name not in names
    ]
    if len(found) < len(settings):
        problems.append("an adapter has settings twice, by handle and by name")
    if problems:
        raise ConfigError("the settings do not fit the adapters", problems=problems)
    check_agreement(found)
    return found


def check_agreement(settings: Mapping[str, TrainSettings]) -> None:
    """Raises ConfigError for settings of the run that differ from adapter to adapter."""
    problems = []
    for key in OF_THE_RUN:
        values = {name: getattr(own, key) for name, own in settings.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{value!r} for {name!r}" for name, value in values.items())
            problems.append(f"{key} is {shown}")
    if problems:
        raise ConfigError(
            "adapters that train together cannot differ in this",
            problems=problems,
            expected=f"one value for all of each of: {', '.join(OF_THE_RUN)}",
            mend="give them the same value, or train them in runs of their own",
        )

"""Several trained adapters of one base that answer together: stacked, or averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

StackOn = Annotated[
    list[str] | None,
    typer.Option(
        help="a trained adapter that acts below this one, which is given what that one makes of "
        "every layer; may be given several times, the one nearest to the base first",
        show_default=False,
        metavar="ADAPTER",
    ),
]
AverageWith = Annotated[
    list[str] | None,
    typer.Option(
        help="a trained adapter that acts beside this one, what they add being averaged; may be "
        "given several times",
        show_default=False,
        metavar="ADAPTER",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="shares of the average with the sum 1, this adapter's first: 0.7,0.3; all alike "
        "otherwise",
        show_default=False,
        metavar="N,...",
    ),
]


@dataclass(frozen=True)
class Others:
    """The adapters that are to act with the one that a command is given.

    Attributes:
        stacked: below it, the one nearest to the base first.
        averaged: beside it.
        shares: of the average, its own first.
    """

    stacked: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()


def others_of(
    subject: str,
    stack_on: Sequence[str] | None,
    average_with: Sequence[str] | None,
    weights: str | None,
) -> Others:
    """What the options ask for.

    Raises:
        ConfigError: they contradict each other, or the weights are no shares of 1.
    """
    from lorica.cli.average import shares_of
    from lorica.errors import ConfigError
    from lorica.files.average import check_shares

    below, beside = tuple(stack_on or ()), tuple(average_with or ())
    problems = []
    if below and beside:
        problems.append("adapters follow each other (--stack-on) or are averaged, not both")
    if weights is not None and not beside:
        problems.append("--weights has no effect without --average-with")
    places = [str(Path(path).resolve()) for path in (subject, *below, *beside)]
    twice = [
        path
        for path, where in zip((subject, *below, *beside), places, strict=True)
        if places.count(where) > 1
    ]
    if twice:
        problems.append(f"{twice[0]} is named twice")
    if problems:
        raise ConfigError("these adapters cannot act together as given", problems=problems)
    given = shares_of(weights) if weights is not None else None
    shares = check_shares([subject, *beside], given) if beside else ()
    return Others(below, beside, tuple(shares))


def join(opened: Any, others: Others) -> None:
    """Load the other adapters onto an opened model, and let all act.

    Raises:
        ConfigError: the adapters cannot act together, with all reasons.
        AdapterFileError: one of them cannot be read, or was made for another base.
    """
    from lorica.attach.activate import Stack, activate
    from lorica.cli.opening import adapter_facts, adapter_folder
    from lorica.errors import AdapterFileError, ConfigError
    from lorica.files.adapter import load_adapter

    paths = others.stacked or others.averaged
    if not paths:
        return
    if opened.adapter is None:
        raise ConfigError(
            f"{opened.name} is a base: other adapters go with an adapter",
            mend="name one adapter first, and the others with the option",
        )
    problems, loaded = [], []
    for number, path in enumerate(paths, 1):
        folder = adapter_folder(Path(path))
        if folder is None:
            raise AdapterFileError(
                f"{path} is neither a run nor an adapter folder",
                expected="a folder with run.json or adapter_config.json",
            )
        problems += _other_classes(opened, path, adapter_facts(folder), bool(others.averaged))
        if not problems:
            loaded.append(load_adapter(opened.model, folder, name=f"with-{number}"))
    every = [*loaded, opened.adapter] if others.stacked else [opened.adapter, *loaded]
    names = {one.name: path for one, path in zip(loaded, paths, strict=False)}
    problems += _in_each_others_way(every, {**names, opened.adapter.name: opened.name}, others)
    if problems:
        raise ConfigError("these adapters cannot act together", problems=problems)
    if others.stacked:
        opened.mixture = Stack(*every)
        opened.notes.append(f"adapters: {' -> '.join([*paths, opened.name])}, one after the other")
    else:
        opened.mixture = {one.name: share for one, share in zip(every, others.shares, strict=True)}
        parts = zip(others.shares, [opened.name, *paths], strict=True)
        opened.notes.append(f"adapters: {' + '.join(f'{w:g} x {p}' for w, p in parts)}")
    activate(opened.model, opened.mixture)


def _other_classes(opened: Any, path: str, facts: dict[str, Any], averaged: bool) -> list[str]:
    """Why an adapter answers something else than the one that it is averaged with."""
    task = facts.get("task")
    if not averaged or not isinstance(task, dict):
        return []
    own = opened.task.facts()
    return [
        f"{path} was trained with {key}: {task[key]}, {opened.name} with {key}: {own.get(key)}"
        for key in ("kind", "labels")
        if key in task and _plain(task[key]) != _plain(own.get(key))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _in_each_others_way(every: Sequence[Any], paths: dict[str, str], others: Others) -> list[str]:
    """Why adapters that were loaded cannot act together, in sentences."""
    from lorica.attach.prompt import is_prompt
    from lorica.methods.copy import Copy

    stages = [(paths[one.name], stage) for one in every for stage in one.stages]
    problems = []
    prompts = [path for path, stage in stages if is_prompt(stage.method)]
    if len(prompts) > 1:
        problems.append(
            f"{' and '.join(prompts)} have virtual tokens, which stand before a row once"
        )
    elif prompts and others.averaged:
        problems.append(
            f"{prompts[0]} has virtual tokens, which stand before a row or do not: they have no "
            "share in an average"
        )
    if not others.stacked:
        return problems
    whole: dict[str, str] = {}
    for path, stage in stages:
        for place, slot in stage.slots.items():
            if isinstance(slot.method, Copy) and place in whole and whole[place] != path:
                problems.append(f"{whole[place]} and {path} both hold {place} whole")
            if isinstance(slot.method, Copy):
                whole.setdefault(place, path)
    summed = {path for path, stage in stages if stage.on is not None and not stage.stacked}
    problems += [
        f"{path} is a sum of several methods, and in a stack each follows the one before"
        for path in sorted(summed)
    ]
    return problems[:10]

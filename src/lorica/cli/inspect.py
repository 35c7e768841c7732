"""What a model consists of, and what each choice of targets would train. No weights are read."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub id, or embedded")],
    task: Annotated[
        str, typer.Option(help="causal-lm, text-classification or seq2seq")
    ] = "causal-lm",
    r: Annotated[int, typer.Option("--r", help="rank to count with")] = 8,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with it")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    import json as jsonlib

    from lorica.attach.inspect import inspect
    from lorica.base.load import empty_model

    found = inspect(empty_model(model, task=task, trust_remote_code=trust_remote_code), r=r)
    if json:
        print(jsonlib.dumps(found.as_dict()))
        return
    _show(found)


def _show(found) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"[bold]{found.model_class}[/] ({found.model_type}): {found.num_parameters:,} parameters, "
        f"{found.num_modules:,} modules, {found.num_blocks} layers\n"
    )
    table = Table("name", "class", "part", "shape", "count", "parameters", box=None, pad_edge=False)
    for group in found.groups:
        shape = " x ".join(map(str, group.shape))
        table.add_row(
            group.suffix,
            group.kind,
            group.role,
            shape,
            f"{group.count}",
            f"{group.num_parameters:,}",
        )
    console.print(table, "")
    choices = Table(
        f"target_modules, r={found.rank}",
        "places",
        "trains",
        "share",
        "which",
        box=None,
        pad_edge=False,
    )
    for choice in found.choices:
        names = ", ".join(f"{name} x {count}" for name, count in choice.suffixes.items())
        choices.add_row(
            choice.choice,
            f"{choice.num_places}",
            f"{choice.num_parameters:,}",
            f"{choice.percent:.2f} %",
            escape(names),
        )
    console.print(choices, "")
    for choice in found.choices:
        console.print(f"{choice.choice}: {escape(choice.reason)}")
    for paths in found.shared:
        console.print(f"one parameter under several names: {escape(', '.join(paths))}")
    if found.uncovered:
        console.print(
            "no adapter can sit on: "
            + escape(", ".join(f"{p} {tuple(s)}" for p, s in found.uncovered.items()))
        )

"""What a model consists of, and what each choice of targets would train. No weights are read."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    model: Annotated[str, typer.Argument(help="a folder, a hub id, or embedded")],
    task: Annotated[
        str,
        typer.Option(
            help="causal-lm, text-classification or seq2seq; auto: as the model's config says"
        ),
    ] = "auto",
    r: Annotated[int, typer.Option("--r", help="rank with which to count", metavar="N", min=1)] = 8,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib

    from lorica.attach.inspect import inspect
    from lorica.base.load import empty_model
    from lorica.cli.kinds import checked_kind

    kind = checked_kind(task, model)
    found = inspect(empty_model(model, task=kind, trust_remote_code=trust_remote_code), r=r)
    if json:
        print(jsonlib.dumps({"task": kind, **found.as_dict()}))
    else:
        print("\n".join(_lines(found, kind)))


def _lines(found: Any, kind: str) -> list[str]:
    """Modules, then choices, then remarks."""
    from lorica.records.lines import aligned
    from lorica.records.phrases import count, parameters

    head = [found.model_class, f"{parameters(found.num_parameters)} parameters"]
    head += [f"{found.num_blocks} layers", f"loaded for {kind}"]
    modules = [["count", "shape", "parameters", "part", "class", "name"]]
    for group in found.groups:
        shape = " x ".join(map(str, group.shape))
        numbers = [count(group.count), shape, count(group.num_parameters)]
        modules.append([*numbers, group.role, group.kind, group.suffix])
    choices = [["target_modules", "places", f"parameters at r={found.rank}", "of the base"]]
    for choice in found.choices:
        size = count(choice.num_parameters)
        choices.append([choice.choice, count(choice.num_places), size, f"{choice.percent:.2f} %"])
    return [
        ", ".join(head),
        "",
        *aligned(modules, left=("part", "class", "name")),
        "",
        *aligned(choices),
        "",
        *_remarks(found),
    ]


def _remarks(found: Any) -> list[str]:
    """Why each choice takes what it takes, and what no adapter can sit on."""
    import shutil
    import textwrap

    remarks = [f"{c.choice}: {c.reason.removeprefix(f'{c.choice}: ')}" for c in found.choices]
    remarks += [f"one parameter under several names: {', '.join(p)}" for p in found.shared]
    if found.uncovered:
        places = (f"{path} {tuple(shape)}" for path, shape in found.uncovered.items())
        remarks.append(f"no adapter can sit on: {', '.join(places)}")
    width = min(shutil.get_terminal_size().columns, 100)
    how = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return [line for remark in remarks for line in textwrap.wrap(remark, width, **how)]

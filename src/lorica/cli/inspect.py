"""What a model consists of, and what each choice of targets would train. No weights are read.

Of a run folder or an adapter folder: what the adapter is, then its base.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    model: Annotated[
        str, typer.Argument(help="a folder, a hub id or embedded; or a run or adapter folder")
    ],
    task: Annotated[
        str,
        typer.Option(
            help="causal-lm, text-classification, seq2seq or text-to-image; auto: as the model's "
            "config says"
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
    from textwrap import wrap

    from lorica.attach.inspect import inspect
    from lorica.base.empty import empty_model
    from lorica.base.quantize import bytes_by_storage
    from lorica.cli.kinds import checked_kind
    from lorica.records.phrases import size

    trained = _trained(Path(model))
    if trained:
        model = trained["base"]
    kind = checked_kind(trained.get("task") or task if task == "auto" else task, model)
    empty = empty_model(model, task=kind, trust_remote_code=trust_remote_code)
    found, memory = inspect(empty, r=r), bytes_by_storage(empty)
    if json:
        own = {"trained": trained} if trained else {}
        print(jsonlib.dumps({"task": kind, **found.as_dict(), "memory": memory, **own}))
    else:
        sizes = ", ".join(f"{word} {size(number)}" for word, number in memory.items())
        lines = wrap(f"memory of the weights: {sizes}", 78, subsequent_indent="  ")
        print("\n".join([*_about(trained), *_lines(found, kind), *lines]))


def _trained(path: Path) -> dict[str, Any]:
    """What a run folder or an adapter folder says of itself; empty where the path is neither.

    Raises:
        AdapterFileError: nothing says what its base is.
    """
    from lorica.cli.opening import adapter_facts, configured_base
    from lorica.files.adapter import CONFIG, WEIGHTS
    from lorica.files.folder import read_json
    from lorica.files.safetensors_file import TensorFile
    from lorica.records.read import read_manifest

    if (path / "run.json").is_file():
        found = read_manifest(path / "run.json")
        return {
            "path": str(path),
            "status": found.get("status"),
            "base": found.get("base", {}).get("name") or _planned_base(path),
            "task": found.get("task"),
            "adapters": {
                name: {"folder": own.get("path"), "kind": own.get("method", {}).get("kind"), **own}
                for name, own in found.get("adapters", {}).items()
            },
        }
    if not (path / CONFIG).is_file():
        return {}
    facts, config = adapter_facts(path), read_json(path / CONFIG)
    with TensorFile(path / WEIGHTS) as file:
        number = sum(math.prod(entry.shape) for entry in file.entries.values())
    kind = str(config.get("peft_type") or config.get("kind")).lower()
    own = {"folder": str(path), "kind": kind, "num_parameters": number}
    return {
        "path": str(path),
        "base": facts.get("base", {}).get("name") or configured_base(path),
        "task": facts.get("task", {}).get("kind"),
        "adapters": {path.name: own},
    }


def _planned_base(path: Path) -> str:
    """The base of a run that was stopped before it was loaded."""
    from lorica.config import load_yaml

    return str(load_yaml(path / "config.yaml").values["model"])


def _about(trained: dict[str, Any]) -> list[str]:
    """The adapters of a run or of an adapter folder."""
    from lorica.records.phrases import count

    if not trained:
        return []
    lines = [f"run {trained['path']}: {trained['status']}"] if "status" in trained else []
    for name, own in trained["adapters"].items():
        places = f", {count(own['num_places'])} places" if "num_places" in own else ""
        below = "".join(f", on {kind}" for kind in own.get("on", ()))
        size = f"{count(own['num_parameters'])} parameters{places}{below}"
        lines.append(f"adapter {name}: {own['kind']}, {size}, in {own['folder']}")
    return [*lines, f"base {trained['base']}:", ""]


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

"""Train the embedded base on embedded data, offline, in under three minutes: the whole way.

The base is a small language model that travels with the package and has only read old books. It
learns to turn facts into a sentence; names and places of the test records never occur in training.
A second adapter, which travels with the package too, has the manner of an assistant with the ears
of a cat: both are mixed at several weights.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorica.cli.importing import uncollected

SETTINGS: dict[str, Any] = {
    "model": "embedded",
    "data": "embedded",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "learning_rate": 4e-3,
    "batch_size": 16,
    "max_steps": 350,
    "eval_steps": 175,
    "dtype": "float32",
    "eval_records": 100,
    "max_new_tokens": 64,
    "num_samples": 6,
}
"""Found by trying; see docs/lab-book.md."""

MIXED_RECORDS = 50
"""Test records that every mixture with the style adapter answers."""


def command(
    output_dir: Annotated[
        str,
        typer.Option(help="folder of the run; an earlier demo in it is replaced", metavar="PATH"),
    ] = "runs/demo",
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="optimizer steps, for a shorter look", show_default=False, min=1, metavar="N"
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object per line on standard output")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="say nothing but warnings and the result")
    ] = False,
) -> None:
    with uncollected():
        import json as jsonlib

        from lorica.cli.demo_mixtures import add_mixtures
        from lorica.cli.run import dress, execute
        from lorica.cli.showing import closing_lines
        from lorica.cli.voice import Voice
        from lorica.config import Layer, resolve
        from lorica.methods import WORDS

    _spare_other_runs(output_dir)
    values = {**SETTINGS, "output_dir": output_dir}
    if max_steps is not None:
        every = min(max_steps, int(SETTINGS["eval_steps"]))
        values |= {"max_steps": max_steps, "eval_steps": every}
    settings = resolve(Layer("demo", values, {}), methods=WORDS)
    outcome = execute(settings, discard=True, json=json, quiet=quiet)
    mixed = add_mixtures(
        outcome.folder,
        num_records=MIXED_RECORDS,
        max_new_tokens=SETTINGS["max_new_tokens"],
        voice=Voice(json=json, quiet=quiet),
    )
    dress(outcome.folder)
    if json:
        print(jsonlib.dumps({"type": "mixtures", **mixed}))
    elif not quiet:
        print("\n".join(_mixture_lines(mixed)))
        print("\n".join(closing_lines(outcome.folder, outcome.samples, most=3)))


def _mixture_lines(mixed: dict[str, Any]) -> list[str]:
    """Scores by the weights of both adapters, and what one record is answered with each."""
    from lorica.cli.showing import one_line
    from lorica.records.lines import aligned
    from lorica.records.mixtures import table

    rows = table(mixed)
    answers = [
        f"  {' and '.join(row[:2]):<13}{one_line(mixture['output'])}"
        for row, mixture in zip(rows[1:], mixed["mixtures"], strict=True)
    ]
    return [
        "",
        f"with a second adapter, for style, on {mixed['num_records']} records; weights and scores:",
        *aligned(rows, left=("none",)),
        "",
        f"  {'input':<13}{one_line(mixed['input'])}",
        *answers,
    ]


def _spare_other_runs(output_dir: str) -> None:
    """Raises ConfigError where the run in the folder is no demo: it would be thrown away."""
    from pathlib import Path

    from lorica.errors import ConfigError
    from lorica.records.folder import RunFolder
    from lorica.records.read import read_run

    if not (Path(output_dir) / "run.json").is_file():
        return
    used = {setting.key: setting.value for setting in read_run(output_dir).settings}
    if used.get("data") != SETTINGS["data"] or used.get("model") != SETTINGS["model"]:
        RunFolder.check(output_dir)
        raise ConfigError(f"{output_dir} holds a run that is no demo")

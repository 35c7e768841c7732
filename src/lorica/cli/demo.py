"""Train the embedded base on embedded data, offline, in under three minutes: the whole way.

The base is a small language model that travels with the package and has only read old books. It
learns to turn facts into a sentence; names and places of the test records never occur in training.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lorica.cli.importing import uncollected

SETTINGS = {
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
        from lorica.cli.run import execute
        from lorica.cli.showing import closing_lines
        from lorica.config import Layer, resolve
        from lorica.methods import WORDS

    _spare_other_runs(output_dir)
    values = {**SETTINGS, "output_dir": output_dir}
    if max_steps is not None:
        every = min(max_steps, int(SETTINGS["eval_steps"]))
        values |= {"max_steps": max_steps, "eval_steps": every}
    settings = resolve(Layer("demo", values, {}), methods=WORDS)
    outcome = execute(settings, discard=True, json=json, quiet=quiet)
    if not (json or quiet):
        print("\n".join(closing_lines(outcome.folder, outcome.samples, most=3)))


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

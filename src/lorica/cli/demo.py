"""Train two adapters on the embedded base, offline, in under three minutes: the whole way.

The base is a small language model that travels with the package and has only read old books. One
adapter learns to turn facts into a sentence; names and places of the test records never occur in
training. The other learns the manner of an assistant with the ears of a cat. Both train in one pass
and are then mixed at several weights.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorica.cli.importing import uncollected

FACTS = {
    "name": "facts",
    "learning_rate": 4e-3,
    "batch_size": 16,
    "max_steps": 350,
}
STYLE = {
    "name": "style",
    "data": "embedded-style",
    "metrics": ["style_marks", "perplexity"],
    "learning_rate": 3e-3,
    "batch_size": 12,
    "max_steps": 150,
}
SETTINGS: dict[str, Any] = {
    "model": "embedded",
    "data": "embedded",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "eval_steps": 175,
    "dtype": "float32",
    "eval_records": 100,
    "max_new_tokens": 64,
    "num_samples": 4,
    "adapters": [FACTS, STYLE],
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
        import json as jsonlib

        from lorica.cli.demo_mixtures import add_mixtures
        from lorica.cli.run import dress
        from lorica.cli.several import closing_lines_of_several, execute_several
        from lorica.cli.voice import Voice
        from lorica.config import Layer, resolve
        from lorica.methods import WORDS

    _spare_other_runs(output_dir)
    values = {**SETTINGS, "output_dir": output_dir}
    if max_steps is not None:
        values = _shortened(values, max_steps)
    settings = resolve(Layer("demo", values, {}), methods=WORDS)
    how = {"json": json, "quiet": quiet, "ignore_memory": False}
    outcome = execute_several(settings, resume=None, discard=True, **how)
    mixed = add_mixtures(
        outcome.folder,
        (FACTS["name"], STYLE["name"]),
        num_records=SETTINGS["eval_records"],
        max_new_tokens=SETTINGS["max_new_tokens"],
        voice=Voice(json=json, quiet=quiet),
    )
    dress(outcome.folder)
    if json:
        print(jsonlib.dumps({"type": "mixtures", **mixed}))
    elif not quiet:
        lines = [*_sample_lines(outcome.samples), *_mixture_lines(mixed)]
        print("\n".join([*lines, *closing_lines_of_several(outcome.folder)]))


def _shortened(values: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """The settings with at most so many steps for every adapter."""
    adapters = [
        {**one, "max_steps": min(max_steps, one["max_steps"])} for one in values["adapters"]
    ]
    every = min(max_steps, int(values["eval_steps"]))
    return {**values, "adapters": adapters, "eval_steps": every}


def _sample_lines(samples: list[dict]) -> list[str]:
    """Two samples of the first adapter and one of the second."""
    from lorica.cli.showing import sample_lines

    first, second = ([s for s in samples if s["adapter"] == one["name"]] for one in (FACTS, STYLE))
    return [*sample_lines(first, 2), *sample_lines(second, 1)]


def _mixture_lines(mixed: dict[str, Any]) -> list[str]:
    """Scores by the weights of both adapters, and what one record is answered with each."""
    from lorica.cli.showing import one_line
    from lorica.records.lines import aligned
    from lorica.records.mixtures import table

    rows = table(mixed)
    answers = [
        f"  {' and '.join(row[:2]):<12}{one_line(mixture['output'])}"
        for row, mixture in zip(rows[1:], mixed["mixtures"], strict=True)
    ]
    return [
        "",
        f"both at once, each with a weight, on {mixed['num_records']} records of the facts:",
        *aligned(rows, left=("none",)),
        "",
        f"  {'input':<12}{one_line(mixed['input'])}",
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

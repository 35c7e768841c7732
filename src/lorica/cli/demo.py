"""Train the embedded base on embedded data, offline, in under three minutes: the whole way, end to end.

The base is a small language model that travels with the package and has only read old books. It learns to turn
facts into a sentence; names and places of the test records never occur in training.
"""

from __future__ import annotations

from typing import Annotated

import typer

SETTINGS = {
    "model": "embedded",
    "data": "embedded",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "batch_size": 32,
    "max_steps": 300,
    "eval_steps": 100,
    "dtype": "float32",
    "eval_records": 100,
    "max_new_tokens": 64,
    "num_samples": 6,
}
"""Found by trying; see docs/lab-book.md."""


def command(
    output_dir: Annotated[str, typer.Option(help="folder of the run; an earlier demo there is replaced")] = "runs/demo",
    max_steps: Annotated[int | None, typer.Option(help="optimizer steps, for a shorter look", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON object per line on standard output")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="warnings and the result only")] = False,
) -> None:
    from lorica.cli.run import execute
    from lorica.config import Layer, resolve
    from lorica.methods import METHODS

    values = {**SETTINGS, "output_dir": output_dir}
    if max_steps is not None:
        values |= {"max_steps": max_steps, "eval_steps": min(max_steps, int(SETTINGS["eval_steps"]))}
    settings = resolve(Layer("demo", values, {}), methods=METHODS)
    outcome = execute(settings, discard=True, json=json, quiet=quiet)
    if json:
        return
    for sample in outcome.samples[:3]:
        print(f"\n  facts      {sample['input'].strip()}")
        print(f"  before     {_line(sample['before'])}")
        print(f"  after      {_line(sample['after'])}")
        print(f"  reference  {_line(sample['references'][0])}")
    print(f"\nreport: {outcome.folder}/report.html    adapter: {outcome.folder}/adapter")
    print(f"next:   lorica chat {outcome.folder}    lorica train --help")


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."

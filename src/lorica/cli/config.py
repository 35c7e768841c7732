"""Print a settings file to start from, with every setting, its default and what it does.

lorica config > run.yaml; then edit it and run: lorica train run.yaml
"""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

NEEDED = {"model": "path-or-hub-id", "data": "records.jsonl", "output_dir": "runs/first"}


def command(
    schema: Annotated[
        bool,
        typer.Option("--schema", help="print the JSON Schema, by which editors complete and check"),
    ] = False,
) -> None:
    import json

    from lorica.config import json_schema, known_settings
    from lorica.methods import WORDS

    if schema:
        print(json.dumps(json_schema(WORDS), indent=2))
        return
    print("version: 1")
    group = ""
    titles = {"run": "What to work on", "train": "Training"}
    for setting in known_settings(WORDS).values():
        if setting.group != group:
            group = setting.group
            print(f"\n# {titles.get(group, f'Method: {group}')}")
        print("\n".join(_lines(setting)))


def _lines(setting) -> list[str]:
    """What a setting does, and the setting: as a comment, but for those that one has to give."""
    from lorica.config.text import yaml_text

    default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    about = textwrap.wrap(setting.help, 96)
    if setting.key in NEEDED:
        line = f"{setting.key}: {yaml_text(NEEDED[setting.key])}"
    else:
        line = f"# {setting.key}: {yaml_text(default)}"
    return ["", *(f"# {text}" for text in about), line]

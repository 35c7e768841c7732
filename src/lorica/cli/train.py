"""Train an adapter on your records, and judge it against the base.

Settings come from a YAML file, from flags, or both; a flag wins: lorica train run.yaml --r 16
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def command(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="settings in YAML", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="go on with the run in this folder", show_default=False)
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="throw away an earlier run in output_dir")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved settings and end")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object per line on standard output")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="warnings and the result only")] = False,
    show_help: Annotated[bool, typer.Option("--help", "-h", help="show this and end")] = False,
) -> None:
    from lorica.cli.options import print_help, read_flags
    from lorica.config import Layer, known_settings, load_yaml, resolve
    from lorica.config.text import flag_layer
    from lorica.methods import METHODS

    known = known_settings(METHODS)
    if show_help:
        print_help(context, known)
        return
    given = list(context.args)
    if config is not None and str(config).startswith("-"):  # a flag that stood first
        given, config = [str(config), *given], None
    flags = read_flags(given, known)
    layers: list[Layer] = []
    if resume is not None:
        layers.append(load_yaml(resume / "config.yaml"))
    if config is not None:
        layers.append(load_yaml(config))
    layers.append(flag_layer(flags, known))
    settings = resolve(*layers, methods=METHODS)
    if dry_run:
        print(settings.to_yaml(), end="")
        return
    from lorica.cli.run import execute

    execute(settings, resume=resume, discard=replace, json=json, quiet=quiet)

"""Find the rank, the rate and other settings: candidates trained together on one base.

What may be chosen stands in the section `search:` of the settings file, lists for choices and
{low: 1e-4, high: 1e-3, log: true} for ranges. The answer is the smallest candidate within one
standard error of the best, as an adapter, with the reason and a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def command(
    context: typer.Context,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="go on with the interrupted search in this folder; where --output-dir names it "
            "too, begin it if need be",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="throw away an earlier run in output_dir")
    ] = False,
    ignore_memory: Annotated[
        bool,
        typer.Option(
            "--ignore-memory", help="begin even where the machine has far too little memory"
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object per line on standard output")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="say nothing but warnings and the answer")
    ] = False,
) -> None:
    from lorica.cli.pages import page

    if {"-h", "--help"} & {*context.args}:
        print(page(context, settings=True), end="")
        return
    from lorica.cli.options import read_flags
    from lorica.cli.train import check_resume, resumed, unbegun
    from lorica.config import known_settings, load_yaml, resolve
    from lorica.config.text import flag_layer
    from lorica.methods import WORDS

    known = known_settings(WORDS)
    own = [p.opts[0] for p in context.command.params]
    line = read_flags(context.args, known, [*own, "--help"])
    layers = [load_yaml(file) for file in line.files]
    if resume is not None and unbegun(resume, line.flags):
        resume = None
    if resume is not None:
        check_resume(resume, replace, line.flags)
        layers.insert(0, resumed(resume))
    settings = resolve(*layers, flag_layer(line.flags, known), methods=WORDS)
    from lorica.cli.search_run import execute_search

    how = {"json": json, "quiet": quiet, "ignore_memory": ignore_memory}
    execute_search(settings, resume=resume, discard=replace, **how)

"""Find the rank, the rate and other settings: candidates trained together on one base.

What may be chosen stands in the section `search:` of the settings file, lists for choices and
{low: 1e-4, high: 1e-3, log: true} for ranges. The answer is the smallest candidate within one
standard error of the best, as an adapter, with the reason and a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorica.cli.importing import uncollected

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
    with uncollected():
        from lorica.cli.layers import layers_of
        from lorica.cli.ranks import ranks
        from lorica.cli.source import shaped_by_source
        from lorica.cli.spread import refuse_spread
        from lorica.config import resolve
        from lorica.methods import WORDS
        from lorica.records.crew import is_crewed

    layers, resume = layers_of(context, resume, replace=replace)
    settings = resolve(*shaped_by_source(layers), methods=WORDS)
    refuse_spread(settings, "lorica search shares the candidates out instead")
    how = {"json": json, "quiet": quiet, "ignore_memory": ignore_memory}
    found = ranks()
    if found.size > 1 or (resume is not None and is_crewed(resume)):
        with uncollected():
            from lorica.cli.search_crew import execute_search_together

        execute_search_together(settings, found, resume=resume, discard=replace, **how)
        return
    with uncollected():
        from lorica.cli.search_run import execute_search

    execute_search(settings, resume=resume, discard=replace, **how)

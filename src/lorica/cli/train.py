"""Train an adapter on your records, and judge it against the base.

Settings come from a YAML file, from flags, or both, and a flag wins: lorica train run.yaml --r 16.
A setting may be written --key value, --key=value or key=value; what can be true or false also --key
and --no-key. A list is written with commas.
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
            help="go on with the interrupted run in this folder; where --output-dir names it too, "
            "begin it if need be",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="throw away an earlier run in output_dir")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved settings as YAML and end")
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
        bool, typer.Option("--quiet", help="say nothing but warnings and the result")
    ] = False,
) -> None:
    from lorica.cli.pages import page

    if {"-h", "--help"} & {*context.args}:
        print(page(context, settings=True), end="")
        return
    with uncollected():
        from lorica.cli.layers import layers_of
        from lorica.cli.source import shaped_by_source
        from lorica.config import resolve
        from lorica.methods import WORDS

    go_on = resume is not None
    layers, resume = layers_of(context, resume, replace=replace)
    layers = shaped_by_source(layers)
    settings = resolve(*layers, methods=WORDS)
    if settings.run.search is not None:
        from lorica.errors import ConfigError

        raise ConfigError(
            f"{settings.origins['search']}: lorica train trains with one value for each setting",
            mend="lorica search tries those of the section search; or take the section out",
        )
    if dry_run:
        print(settings.to_yaml(), end="")
        return
    with uncollected():
        from lorica.cli.ranks import ranks, refuse_ranks
        from lorica.cli.run import execute
        from lorica.cli.showing import closing_lines
        from lorica.records.crew import is_crewed

    how = {"json": json, "quiet": quiet, "ignore_memory": ignore_memory}
    found = ranks()
    if settings.run.shard_base:
        from lorica.cli.spread_run import execute_spread

        execute_spread(settings, found, resume=resume, discard=replace, **how)
        return
    if settings.adapters and (found.size > 1 or (resume is not None and is_crewed(resume))):
        from lorica.cli.several import closing_lines_of_several
        from lorica.cli.several_crew import execute_several_together

        ended = execute_several_together(settings, found, resume=resume, discard=replace, **how)
        if ended is not None and not (json or quiet):
            print("\n".join(closing_lines_of_several(ended.folder)))
        return
    refuse_ranks("a run of one adapter" if not settings.run.seeds else "a run for several seeds")
    if settings.run.seeds:
        from lorica.cli.seeds import execute_seeds

        execute_seeds(settings, go_on=go_on, discard=replace, **how)
        return
    if settings.adapters:
        from lorica.cli.several import closing_lines_of_several, execute_several

        outcome = execute_several(settings, resume=resume, discard=replace, **how)
        if not (json or quiet):
            print("\n".join(closing_lines_of_several(outcome.folder)))
        return
    if settings.stages:
        from lorica.cli.stages import execute_stages

        outcome = execute_stages(settings, resume=resume, discard=replace, **how)
    else:
        outcome = execute(settings, resume=resume, discard=replace, **how)
    if json or quiet:
        return
    from lorica.cli.images import closing, is_for_images

    if is_for_images(settings.run):
        print("\n".join(closing(outcome.folder, settings.run.model)))
    else:
        print("\n".join(closing_lines(outcome.folder, outcome.samples)))

"""Train an adapter on your records, and judge it against the base.

Settings come from a YAML file, from flags, or both, and a flag wins: lorica train run.yaml --r 16.
A setting may be written --key value, --key=value or key=value; what can be true or false also --key
and --no-key. A list is written with commas.
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
    from lorica.cli.options import read_flags
    from lorica.cli.source import shaped_by_source
    from lorica.config import known_settings, load_yaml, resolve
    from lorica.config.text import flag_layer
    from lorica.methods import WORDS

    known = known_settings(WORDS)
    own = [p.opts[0] for p in context.command.params]
    line = read_flags(context.args, known, [*own, "--help"])
    layers = [load_yaml(file) for file in line.files]
    go_on = resume is not None
    if resume is not None and unbegun(resume, line.flags):
        resume = None  # with --output-dir, the same line begins a run and goes on with it
    if resume is not None:
        check_resume(resume, replace, line.flags)
        layers.insert(0, resumed(resume))
    layers = shaped_by_source([*layers, flag_layer(line.flags, known)])
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
    from lorica.cli.run import execute
    from lorica.cli.showing import closing_lines

    how = {"json": json, "quiet": quiet, "ignore_memory": ignore_memory}
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


def unbegun(folder: Path, flags: dict[str, str]) -> bool:
    """Whether the command line names this folder as its output too, and no run has begun there."""
    from lorica.config.names import ALIASES

    named = [Path(v) for k, v in flags.items() if ALIASES.get(k, k) == "output_dir"]
    begun = (folder / "run.json").is_file()
    return not begun and any(path.resolve() == folder.resolve() for path in named)


def check_resume(folder: Path, replace: bool, flags: dict[str, str]) -> None:
    """Raises ConfigError for what goes with no resumed run."""
    from lorica.config.names import ALIASES
    from lorica.errors import ConfigError

    problems = []
    if not (folder / "run.json").is_file() or not (folder / "config.yaml").is_file():
        problems.append(f"{folder} holds no run: no run.json and config.yaml that lorica wrote")
    if replace:
        problems.append("--replace would throw away the run that --resume goes on with")
    for name, value in flags.items():
        if ALIASES.get(name, name) == "output_dir" and Path(value).resolve() != folder.resolve():
            problems.append(f"--output-dir {value} is another folder than that of --resume")
    if problems:
        raise ConfigError("this run cannot be gone on with", problems=problems)


def resumed(folder: Path):
    """The settings of a run, each with the origin that it had."""
    from lorica.config import Layer, load_yaml
    from lorica.records.read import read_settings

    file = folder / "config.yaml"
    layer = load_yaml(file)
    origins = {setting.key: setting.origin for setting in read_settings(file) if setting.origin}
    return Layer(layer.origin, layer.values, {**layer.origins, **origins})

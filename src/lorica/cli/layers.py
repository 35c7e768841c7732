"""The settings of a command line, layer by layer: the run that it goes on with, files, flags."""

from __future__ import annotations

from pathlib import Path

import typer

from lorica.cli.options import read_flags
from lorica.config import Layer, known_settings, load_yaml
from lorica.config.names import ALIASES
from lorica.config.text import flag_layer
from lorica.errors import ConfigError
from lorica.methods import WORDS
from lorica.records.read import read_settings


def layers_of(
    context: typer.Context, resume: Path | None, *, replace: bool
) -> tuple[list[Layer], Path | None]:
    """The layers of settings, the later ones above the earlier, and the run to go on with.

    Args:
        resume: the folder that --resume names. Where --output-dir names it too and nothing has
            begun there, the same line begins a run and goes on with it.
        replace: whether --replace was given.

    Raises:
        ConfigError: a flag or a file that cannot be read; what goes with no resumed run.
    """
    known = known_settings(WORDS)
    own = [p.opts[0] for p in context.command.params]
    line = read_flags(context.args, known, [*own, "--help"])
    layers = [load_yaml(file) for file in line.files]
    if resume is not None and _unbegun(resume, line.flags):
        resume = None
    if resume is not None:
        _check_resume(resume, replace, line.flags)
        layers.insert(0, _resumed(resume))
    return [*layers, flag_layer(line.flags, known)], resume


def _unbegun(folder: Path, flags: dict[str, str]) -> bool:
    """Whether the command line names this folder as its output too, and no run has begun there."""
    named = [Path(v) for k, v in flags.items() if ALIASES.get(k, k) == "output_dir"]
    begun = (folder / "run.json").is_file()
    return not begun and any(path.resolve() == folder.resolve() for path in named)


def _check_resume(folder: Path, replace: bool, flags: dict[str, str]) -> None:
    """Raises ConfigError for what goes with no resumed run."""
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


def _resumed(folder: Path) -> Layer:
    """The settings of a run, each with the origin that it had."""
    file = folder / "config.yaml"
    layer = load_yaml(file)
    origins = {setting.key: setting.origin for setting in read_settings(file) if setting.origin}
    return Layer(layer.origin, layer.values, {**layer.origins, **origins})

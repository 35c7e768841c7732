"""The commands and flags that `lorica` has, for the tests about them."""

import os

import typer.main

from lorica.cli import app
from lorica.config import known_settings
from lorica.methods import WORDS


def commands() -> dict[str, frozenset[str]]:
    """Command -> its flags. Words of nested commands are joined by a space; "" is lorica alone."""
    os.environ["TERM"] = "dumb"
    return dict(_walk(typer.main.get_command(app), ""))


def _walk(command, name):
    context = command.make_context(name or "lorica", [], resilient_parsing=True)
    flags = {"--help"} | {
        flag
        for parameter in command.get_params(context)
        for flag in (*parameter.opts, *parameter.secondary_opts)
        if flag.startswith("-")
    }
    takes_settings = context.ignore_unknown_options and context.allow_extra_args
    if takes_settings:  # every setting of a run is a flag there
        flags |= {setting.flag for setting in known_settings(WORDS).values()}
    yield name, frozenset(flags)
    for child in getattr(command, "list_commands", lambda _: [])(context):
        yield from _walk(command.get_command(context, child), f"{name} {child}".strip())


def aliases() -> set[str]:
    """Further spellings of the flags that are settings: other tools' names, and `--no-x`."""
    known = known_settings(WORDS).values()
    other = {alias for setting in known for alias in setting.aliases}
    other |= {f"no_{setting.key}" for setting in known if bool in setting.kinds}
    return {"--" + name.replace("_", "-") for name in other}

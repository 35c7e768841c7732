"""Flags that are made from the settings: parsing them, and the help page of `lorica train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer

from lorica.config.settings import REQUIRED, Setting
from lorica.errors import ConfigError, nearest


def read_flags(given: Sequence[str], known: Mapping[str, Setting]) -> dict[str, str]:
    """`--key value`, `--key=value`, `key=value` and, for truths, `--key` and `--no-key` -> name -> text.

    Raises:
        ConfigError: something that is none of these, or a flag without its value; all at once.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    rest = list(given)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        plain = name.lstrip("-").replace("-", "_")
        if not name.startswith("--") and not equals:
            near = nearest(word, [s.flag for s in known.values()])
            problems.append(f"{word!r} is no flag" + (f"; did you mean {near}?" if near else ""))
        elif equals:
            found[plain] = value
        elif plain.startswith("no_") and _is_truth(plain[3:], known):
            found[plain[3:]] = "false"
        elif rest and not (rest[0].startswith("--") and len(rest[0]) > 2):
            found[plain] = rest.pop(0)
        elif _is_truth(plain, known):
            found[plain] = "true"
        else:
            problems.append(f"{name} needs a value")
    if problems:
        raise ConfigError(
            "the command line cannot be read", problems=problems, mend="see lorica train --help"
        )
    return found


def _is_truth(name: str, known: Mapping[str, Setting]) -> bool:
    return name in known and bool in known[name].kinds


def print_help(context: typer.Context, known: Mapping[str, Setting]) -> None:
    """The help page of a command whose flags are settings."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print("[bold]Usage:[/] lorica train \\[SETTINGS.yaml] \\[--key value ...]\n")
    console.print(f"{(context.command.help or '').strip()}\n", markup=False)
    titles = {"run": "What to work on", "train": "Training"}
    own = {
        p.opts[0]: p.help
        for p in context.command.params
        if p.opts[0].startswith("--") and hasattr(p, "help")
    }
    groups: dict[str, list[tuple[str, str]]] = {
        "Command": [(flag, str(text)) for flag, text in own.items()]
    }
    for setting in known.values():
        title = titles.get(setting.group, f"Method: {setting.group}")
        groups.setdefault(title, []).append((setting.flag, f"{setting.help}{_default(setting)}"))
    for title, rows in groups.items():
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            show_header=False,
            box=None,
            padding=(0, 2),
        )
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for flag, text in rows:
            table.add_row(flag, _escape(text))
        console.print(table, "")


def _default(setting: Setting) -> str:
    if setting.default is REQUIRED:
        return " [needed]"
    if setting.default in (None, "", (), {}):
        return ""
    return f" [{str(setting.default).lower() if isinstance(setting.default, bool) else setting.default}]"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)

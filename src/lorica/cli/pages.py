"""Help pages: every flag with what it does, readable in 80 columns, alike for all commands."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica.cli.options import choices
from lorica.config.settings import REQUIRED, Setting, known_settings
from lorica.config.words import is_list, is_mapping

INDENT, WIDEST = 26, 100
HELP = ("--help, -h", "show this and end")

Entries = Sequence[tuple[str, str]]


METHOD_FLAGS = Path(__file__).parent / "method_flags.json"
"""The settings of all methods as help pages show them: title -> [flag, text]. Written from the
methods (tests/house/test_cli_flags.py), which load torch, so that `--help` need not.
"""


def page(context: Any, *, settings: bool = False) -> str:
    """The help page of a command.

    Args:
        context: of the command that is asked.
        settings: whether those of a run are flags of it too.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    command = context.command
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.opts[0] != "--help"]
    usage = " ".join(p.name.upper() for p in arguments)
    usage += "[SETTINGS.yaml] [--key value ...]" if settings else " [OPTIONS]"
    lines = [f"Usage: lorica {command.name} {usage.strip()}"]
    for paragraph in (command.help or "").split("\n\n"):
        lines += ["", textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False)]
    entries = [(p.name.upper(), p.help or "") for p in arguments]
    groups: dict[str, Entries] = {"Arguments": entries} if entries else {}
    groups["Options"] = [*map(_option, options), HELP]
    for title, rows in {**groups, **(_of_runs() if settings else {})}.items():
        lines += ["", title]
        for flag, text in rows:
            lines += _entry(flag, text, width)
    return "\n".join(lines) + "\n"


def _entry(flag: str, text: str, width: int) -> Iterator[str]:
    """A flag and what it does; a long flag has a line of its own."""
    lines = textwrap.wrap(text, max(20, width - INDENT), break_on_hyphens=False)
    head = f"  {flag}"
    if len(head) + 2 > INDENT:
        yield head
    else:
        yield head.ljust(INDENT) + lines.pop(0)
    for line in lines:
        yield " " * INDENT + line


def _option(option: Any) -> tuple[str, str]:
    """The line of an option that the command has itself."""
    flag = option.opts[0]
    if option.secondary_opts:
        flag += f", {option.secondary_opts[0]}"
    elif not option.is_flag:
        flag += f" {option.metavar or 'TEXT'}"
    shown = "" if option.is_flag or option.default in (None, "") else f" [{option.default}]"
    if option.required:
        shown = " [required]"
    return flag, f"{option.help}{shown}"


def _of_runs() -> dict[str, Entries]:
    """All settings of a run, by their group."""
    return {**settings_by_group(known_settings()), **json.loads(METHOD_FLAGS.read_bytes())}


def settings_by_group(settings: Mapping[str, Setting]) -> dict[str, list[tuple[str, str]]]:
    """Title -> lines of the settings, by their group."""
    groups: dict[str, list[tuple[str, str]]] = {}
    titles = {"run": "What to work on", "train": "Training"}
    for setting in settings.values():
        title = titles.get(setting.group, f"Method: {setting.group}")
        entry = f"{setting.flag} {_placeholder(setting)}".rstrip(), _text(setting)
        groups.setdefault(title, []).append(entry)
    return groups


def _placeholder(setting: Setting) -> str:
    kinds = setting.kinds
    if bool in kinds:
        return ""
    for fits, word in (
        (any(is_mapping(kind) for kind in kinds), "A=B,..."),
        (any(is_list(kind) for kind in kinds), "A,B,..."),
        (float in kinds or int in kinds, "N"),
        (setting.expected.startswith("a path"), "PATH"),
    ):
        if fits:
            return word
    return "WORD" if choices(kinds) else "TEXT"


def _text(setting: Setting) -> str:
    words, default = choices(setting.kinds), setting.default
    listed = f" ({', '.join(words)})" if len(words) > 1 else ""
    if default is REQUIRED:
        shown = " [required]"
    elif default in (None, "", (), {}):
        shown = ""
    elif isinstance(default, bool):
        shown = f" [{str(default).lower()}]"
    else:
        shown = f" [{default:g}]" if isinstance(default, float) else f" [{default}]"
    return f"{setting.help}{listed}{shown}"

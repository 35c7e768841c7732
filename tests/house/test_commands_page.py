"""The page about commands shows every help page, as the commands print it.

After a change that is meant: LORICA_WRITE_DOCS=1 pytest tests/house/test_commands_page.py
"""

import os
from pathlib import Path

import pytest

from lorica.cli import COMMANDS, main

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
MARK = "<!-- The rest is written by "


def help_page(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_page_shows_what_the_commands_print(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    pages = {f"lorica {name}".strip(): help_page(name, capsys) for name in ("", *COMMANDS)}
    shown = "".join(f"\n## {name}\n\n```text\n{text}```\n" for name, text in pages.items())
    head, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    command = rest.partition("\n")[0]
    wanted = f"{head}{mark}{command}\n{shown}"
    if os.environ.get("LORICA_WRITE_DOCS"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert mark and PAGE.read_text(encoding="utf-8") == wanted, __doc__

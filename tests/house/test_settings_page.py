"""The page about settings lists them all, as the code has them.

After a change that is meant: LORICA_WRITE_DOCS=1 pytest tests/house/test_settings_page.py
"""

import os
from pathlib import Path

from lorica.config import known_settings
from lorica.config.settings import REQUIRED
from lorica.config.text import yaml_text
from lorica.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
MARK = "<!-- The rest is written by "
TITLES = {"run": "What a run works on", "train": "How it trains"}


def tables() -> str:
    lines = []
    group = ""
    for setting in known_settings(METHODS).values():
        if setting.group != group:
            group = setting.group
            title = TITLES.get(group, f"The method {group}")
            lines += ["", f"## {title}", "", "| setting | default | expected | what it does |"]
            lines += ["|---|---|---|---|"]
        default = setting.default
        plain = list(default) if isinstance(default, tuple) else default
        shown = "required" if default is REQUIRED else f"`{yaml_text(plain)}`"
        also = f"<br>also: {', '.join(setting.aliases)}" if setting.aliases else ""
        lines.append(f"| `{setting.key}` | {shown} | {setting.expected} | {setting.help}{also} |")
    return "\n".join(lines) + "\n"


def test_the_page_lists_what_there_is():
    head, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    command = rest.partition("\n")[0]
    wanted = f"{head}{mark}{command}\n{tables()}"
    if os.environ.get("LORICA_WRITE_DOCS"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert mark and PAGE.read_text(encoding="utf-8") == wanted, __doc__

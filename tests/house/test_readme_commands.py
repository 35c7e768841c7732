"""Every command line that the README and the docs show exists, with every flag it uses."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from house.command_line import aliases, commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(text: str) -> list[str]:
    """The `lorica ...` lines of the shell blocks of a page, continued lines joined."""
    found = []
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, flags=re.DOTALL):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            line = line.strip().removeprefix("$ ")
            found += [line] if line.startswith("lorica ") else []
    return found


@cache
def known() -> dict[str, frozenset[str]]:
    return commands()


def shown() -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), line)
        for page in PAGES
        if page.exists()
        for line in command_lines(page.read_text(encoding="utf-8"))
    ]


def problem(line: str) -> str | None:
    """What is wrong with a command line; None where all of it exists."""
    words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]
    words = [word.strip("[]") for word in words]  # [--optional value]
    name = ""
    for word in words:
        if f"{name} {word}".strip() not in known():
            break
        name = f"{name} {word}".strip()
    if not name and words and not words[0].startswith("-"):
        return f"there is no command {words[0]}"
    flags = {word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)}
    wrong = sorted(flags - known()[name] - aliases())
    return f"lorica {name} has no {', '.join(wrong)}" if wrong else None


@pytest.mark.parametrize(("page", "line"), shown())
def test_command_lines_exist(page, line):
    assert problem(line) is None, f"{page}: {line}"


def test_the_readme_shows_the_first_run():
    lines = command_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(line.startswith("lorica demo") for line in lines)
    assert any(line.startswith("lorica train") for line in lines)


def test_wrong_lines_would_be_found():
    assert problem("lorica trian --r 8") == "there is no command trian"
    assert problem("lorica train --model m --rr 8") == "lorica train has no --rr"
    assert problem("lorica train --model m --lora-rank 8  # an alias") is None
    text = "```bash\nlorica train \\\n    --r 8\n$ lorica demo\n```\n```python\nlorica demo\n```"
    assert command_lines(text) == ["lorica train --r 8", "lorica demo"]


def test_claims_of_equality_stand_beside_their_noise():
    """Two seeds leave much undecided; the table says how much, as the results have it."""
    lines = [li for li in PAGES[0].read_text(encoding="utf-8").splitlines() if "within noise" in li]
    claimed = [float(found) for line in lines for found in re.findall(r"±([\d.]+)", line)]
    wanted = []
    for name, metrics in (
        ("e2e", ("bleu", "loss")),
        ("sst2", ("accuracy",)),
        ("mrpc", ("accuracy",)),
    ):
        text = (ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")
        rows = json.loads(text)["equality"]["peft"]
        wanted += [rows[metric]["noise_of_seeds"] for metric in metrics]
    assert claimed == pytest.approx(wanted, rel=0.03) and len(lines) == 3

"""The README holds the file tree of the package, one line per file, and it is true."""

import ast
import re
from pathlib import Path

import lorica

PACKAGE = Path(lorica.__file__).parent
README = Path(__file__).parents[2] / "README.md"


def files() -> set[str]:
    """Every Python file, except the `__init__.py` of subpackages, which hold little."""
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    return {name for name in found if name == "__init__.py" or not name.endswith("/__init__.py")}


def drawn(readme: str) -> set[str]:
    """The files in the README's block that begins with `src/lorica/`; folders end in a slash."""
    match = re.search(r"```\w*\nsrc/lorica/.*?\n(.*?)```", readme, flags=re.DOTALL)
    assert match, "the README has no block that begins with a line `src/lorica/`"
    folders: list[tuple[int, str]] = []
    found = set()
    for line in match.group(1).splitlines():
        item = re.match(r"( +)([\w./-]+)", line)
        if not item or line.strip().startswith("#"):
            continue
        indent, name = len(item.group(1)), item.group(2)
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        if name.endswith("/"):
            folders.append((indent, name))
        elif name.endswith(".py"):
            found.add("".join(folder for _, folder in folders) + name)
    return found


def proposal(names: set[str]) -> str:
    """The block as it could stand in the README, from the first line of every docstring."""
    lines, above = ["src/lorica/"], ""
    for name in sorted(names, key=lambda name: ("/" in name, name)):
        folder, _, file = name.rpartition("/")
        if folder != above:
            lines.append(f"  {folder}/")
            above = folder
        text = ast.get_docstring(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))) or ""
        indent = "    " if folder else "  "
        lines.append(f"{indent}{file:<16} {text.partition(chr(10))[0]}")
    return "\n".join(lines)


def test_the_tree_is_true():
    there, shown = files(), drawn(README.read_text(encoding="utf-8"))
    assert not there ^ shown, (
        f"not in the README: {sorted(there - shown)}; no longer a file: {sorted(shown - there)}\n"
        f"{proposal(there)}"
    )


def test_every_file_says_what_it_is_for():
    silent = [
        name
        for name in files()
        if not ast.get_docstring(ast.parse((PACKAGE / name).read_text(encoding="utf-8")))
    ]
    assert not silent, f"no docstring at the head of {silent}"


def test_a_drawn_tree_is_read_as_it_is_meant():
    readme = (
        "# x\n```\nsrc/lorica/   all\n  __init__.py  names\n  # floor 0\n  errors.py  words\n"
        "  data/        records\n    read.py    files\n    deep/\n      a.py  x\n"
        "  mix.py  merge\n```\n"
    )
    assert drawn(readme) == {"__init__.py", "errors.py", "data/read.py", "data/deep/a.py", "mix.py"}

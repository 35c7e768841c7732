"""Imports go down only: a module may import its own package and what lies on floors below."""

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lorica

PACKAGE = Path(lorica.__file__).parent
ROOT = Path(__file__).parents[2]

FLOORS = {
    "errors": 0,
    "config": 0,
    "records": 0,
    "ops": 1,
    "data": 1,
    "base": 2,
    "methods": 2,
    "attach": 3,
    "tasks": 3,
    "files": 3.5,  # a file is read onto a model: loading attaches
    "mix": 4,
    "train": 4,
    "infer": 4,
    "evaluate": 5,
    "search": 5,
    "serve": 5,
    "cli": 6,
    "__main__": 7,
}
"""The house of the design, from the words at the bottom to the doors at the top."""

BENEATH_ALL = {"errors"}
"""May be imported from everywhere, its own floor included."""

LAZY = {"cli"}
"""Packages that may import inside functions: a command loads what it needs when it is called."""


@dataclass(frozen=True)
class Import:
    """One import statement."""

    file: str
    line: int
    target: str
    inside: bool


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The top-level name below lorica that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    file = str(path.relative_to(PACKAGE.parent))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import in full"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(file, node.lineno, target, id(node) in inside)


def ours(target: str) -> str | None:
    """The name below lorica that an import reads; None for other packages and `lorica` itself."""
    parts = target.split(".")
    if parts[0] != "lorica" or len(parts) < 2 or parts[1] == "__version__":
        return None
    return parts[1]


def optional_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [line for name, lines in extras.items() if name != "dev" for line in lines]
    return {re.split(r"[\[<>=~! ;]", line)[0].replace("-", "_") for line in lines}


def test_every_module_lives_on_a_floor():
    homeless = {name_of(path) for path in sources()} - set(FLOORS) - {"__init__"}
    assert not homeless, f"{homeless} is named in no floor of the design; find it a home there"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = name_of(path)
    wrong = []
    for item in imports(path):
        there = ours(item.target)
        if here == "__init__" or there is None or there == here or there in BENEATH_ALL:
            continue
        if there not in FLOORS:
            wrong.append(f"{item.file}:{item.line}: lorica.{there} is on no floor")
        elif FLOORS[there] >= FLOORS[here]:
            wrong.append(
                f"{item.file}:{item.line}: {here} (floor {FLOORS[here]}) imports "
                f"{there} (floor {FLOORS[there]})"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stand_at_the_top(path):
    if name_of(path) in LAZY:
        return
    optional = optional_packages()
    wrong = [
        f"{item.file}:{item.line}: import {item.target} inside a function"
        for item in imports(path)
        if item.inside and item.target.split(".")[0] not in optional
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    optional = optional_packages()
    wrong = [
        f"{item.file}:{item.line}: {item.target} is optional; import it in the function"
        for item in imports(path)
        if not item.inside and item.target.split(".")[0] in optional
    ]
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_what_it_should(tmp_path):
    path = PACKAGE / "config" / "resolve.py"
    found = {item.target for item in imports(path)}
    assert "lorica.errors.ConfigError" in found and "lorica.config.text.Layer" in found
    assert ours("lorica.errors.ConfigError") == "errors" and ours("torch.nn") is None
    assert optional_packages() >= {"pyarrow", "datasets"}

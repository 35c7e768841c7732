"""The public surface: one table, documented, and free to import."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorica
from lorica.cli import COMMANDS

SOURCE = Path(lorica.__file__)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", lorica.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(lorica, name)
    assert value.__module__ == lorica._PUBLIC[name], "the table names where it is defined"
    assert value.__doc__ and value.__doc__.strip()
    assert name in dir(lorica)


def test_editors_see_the_same_names():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            assert name.asname == name.name, "the form `name as name` says that it is public"
            seen[name.name] = node.module
    assert seen == lorica._PUBLIC
    assert sorted(lorica.__all__) == sorted(seen)


def test_the_surface_stays_small():
    assert 15 <= len(lorica.__all__) <= 30


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = lorica.trian


def test_functions_are_not_hidden_by_packages_of_their_name():
    shared = {module.name for module in pkgutil.iter_modules(lorica.__path__)} & {*lorica.__all__}
    assert shared, "such as attach: the function, and the package it comes from"
    for name in shared:
        importlib.import_module(f"lorica.{name}")
        assert callable(getattr(lorica, name))
        assert sys.modules[f"lorica.{name}"] is not getattr(lorica, name)


def test_import_loads_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "pydantic", "matplotlib", "rich")
    done = python(f"import sys, lorica; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("floor_0", ["config", "errors", "records.write", "records.live"])
def test_the_lowest_floor_loads_no_torch(floor_0):
    done = python(f"import sys, lorica.{floor_0}; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_no_torch(command):
    words = [word for word in ("lorica", command, "--help") if word]
    code = (
        f"import sys\nsys.argv = {words}\nfrom lorica.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = [m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules]\n"
        "print('LOADED', heavy, 'CODE', code or 0)"
    )
    done = python(code)
    assert "LOADED [] CODE 0" in done.stdout, done.stdout + done.stderr
    wanted = ("train", "demo") if not command else (f"Usage: lorica {command}",)
    assert all(word in done.stdout for word in wanted)

"""Scripts of benchmarks/ for the tests of what they compute and write."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """The script of this name, imported as scripts import each other: from their own folder.

    No other test finds them under their names, of which some (`page`, `jobs`) are anybody's.
    """
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        found = importlib.import_module(name)
    for loaded, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[loaded]
    return found

"""The pages that scripts of benchmarks/ write are what these make of the figures in results/."""

import re
from pathlib import Path

import pytest

from benchmark import BENCHMARKS, script

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = sorted(
    path.stem
    for path in BENCHMARKS.glob("*.py")
    if "\ndef page() -> str:\n" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_is_that_of_the_figures(name):
    written = script(name)
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), (
        f"benchmarks/{name}.py makes another {written.PAGE.name} of the figures: mend the words in "
        "the script, or the figures, and write the page as it says itself"
    )


@pytest.mark.skipif(not SCRIPTS, reason="the benchmarks are not part of this distribution")
def test_every_page_that_says_so_has_its_script():
    of_scripts = {script(name).PAGE for name in SCRIPTS}
    by_benchmarks = re.compile(r"this\s+page\s+is\s+written\s+by\s+(it|`python benchmarks/)", re.I)
    say_so = {page for page in DOCS.glob("*.md") if by_benchmarks.search(page.read_text("utf-8"))}
    assert say_so and say_so <= of_scripts

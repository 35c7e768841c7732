"""One self-contained HTML page about a run: no network, no script, same run, same bytes."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lorica.records.atomic import write_file
from lorica.records.folder import REPORT
from lorica.records.read import Run, read_run
from lorica.records.sections import HERE, content

# C0 and C1 controls (but tab and newline), lone surrogates, and the marks that reorder text
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def write_report(run_folder: str | Path, *, output: str | Path | None = None) -> Path:
    """Write report.html into the run folder, or to `output`; a run that is not finished gets what
    there is.

    Raises:
        DataError: the folder holds no run, or one that cannot be read.
    """
    run = read_run(run_folder)
    target = Path(output) if output is not None else run.path / REPORT
    return write_file(target, page(run).encode("utf-8"))


def page(run: Run) -> str:
    """The page as text."""
    return environment().get_template("report.html.jinja").render(content(run))


def environment() -> Environment:
    """What renders pages: everything is escaped, and signs that would act unseen are shown."""
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def _visible(value: object) -> object:
    """What would act unseen, replaced by a sign for it. jinja calls this on everything that it
    prints.
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNSEEN.sub(_sign, value)
    return value


def _sign(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "�"

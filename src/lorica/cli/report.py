"""Make the page of a run anew: one file, report.html, that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="where to write it; report.html in the run folder otherwise",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
) -> None:
    from lorica.records.report import write_report

    print(write_report(run, output=output))

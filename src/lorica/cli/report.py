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
    from lorica.records.folder import SEARCH
    from lorica.records.report import write_report
    from lorica.records.search_page import write_search_page

    if (run / SEARCH).is_file():
        print(write_search_page(run, output=output))
        return
    print(write_report(run, output=output))

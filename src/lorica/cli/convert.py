"""Read an adapter in any format and write it in another one.

The format of what is given is found out by what it holds. The base is loaded besides, since names
and shapes are checked against it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[
        str, typer.Argument(help="a run, an adapter folder, or a file or folder of another tool")
    ],
    output: Annotated[Path, typer.Argument(help="a new file or folder")],
    format: Annotated[
        str,
        typer.Option(
            help="peft, lorica, gguf, kohya, diffusers, mlx, adapterhub, vllm", metavar="NAME"
        ),
    ] = "lorica",
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapter, where its files do not say it",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="precision of what is written, such as float16; else the format's own",
            show_default=False,
            metavar="NAME",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace what is at output")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import sys

    from lorica.cli.exchange import check_format, open_adapter, written
    from lorica.cli.voice import Voice

    precision = check_format(format, dtype, models=False)
    voice = Voice(quiet=json, stream=sys.stderr)
    with voice.work(f"loading {source}"):
        opened = open_adapter(source, model)
    written(opened, format, output, precision, overwrite, json)

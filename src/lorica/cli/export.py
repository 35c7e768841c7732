"""Write an adapter, or the model that it makes, in the format of another tool.

What a format cannot hold is refused with the reason; nothing is left out silently. The formats,
and what was checked against which tool, stand in docs/formats.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[
        str,
        typer.Argument(help="a run folder or an adapter folder; for whole models a base as well"),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="peft, lorica, gguf, kohya, diffusers, mlx, adapterhub, vllm; merged into the "
            "base: gguf-model, ollama, onnx",
            metavar="NAME",
        ),
    ],
    output: Annotated[Path, typer.Option(help="a new file or folder", metavar="PATH")],
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapter, where it has moved", show_default=False, metavar="PATH"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="precision of what is written, such as float16 or q8_0; else the format's own",
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

    from lorica.base.known import known
    from lorica.cli.exchange import check_format, open_adapter, tell, written
    from lorica.cli.opening import open_subject
    from lorica.cli.voice import Voice
    from lorica.files.exports import MODELS
    from lorica.mix import merge

    precision = check_format(format, dtype, models=True)
    voice = Voice(quiet=json, stream=sys.stderr)
    if format not in MODELS:
        with voice.work(f"loading {adapter}"):
            opened = open_adapter(adapter, model)
        written(opened, format, output, precision, overwrite, json)
        return
    with voice.work(f"loading {adapter}"):
        subject = open_subject(adapter, base=model, dtype="float32")
    if subject.adapter is not None:
        with voice.work("merging"):
            merge(subject.model, subject.adapter)
    with voice.work("writing"):
        tokenizer = known(subject.model).tokenizer
        notes = MODELS[format].write(subject.model, tokenizer, output, precision, overwrite)
    tell(format, output, precision, notes, json)

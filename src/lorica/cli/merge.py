"""Write an adapter into its base: a plain model folder that any tool loads.

The sum is taken in float32 and rounded once; how much of the adapter the rounding destroys is told per weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[str, typer.Argument(help="run folder or adapter folder")],
    output_dir: Annotated[Path, typer.Option(help="where the merged model goes; must not exist")],
    model: Annotated[
        str | None,
        typer.Option(help="the adapter's base, where it is not where it was", show_default=False),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="of the merged model: float32, bfloat16, float16; as-stored keeps the base's"
        ),
    ] = "as-stored",
    weight: Annotated[float, typer.Option(help="how much of the adapter")] = 1.0,
    force: Annotated[
        bool,
        typer.Option("--force", help="merge even where rounding destroys a quarter of the adapter"),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a model in output_dir")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    import json as jsonlib
    from dataclasses import asdict

    from lorica.base.load import base_of
    from lorica.cli.opening import adapter_folder, open_subject
    from lorica.errors import AdapterFileError
    from lorica.files.whole import save_merged
    from lorica.mix import merge

    if adapter_folder(Path(adapter)) is None:
        raise AdapterFileError(
            f"{adapter} is neither a run nor an adapter folder",
            expected="a folder with adapter_config.json",
        )
    opened = open_subject(adapter, base=model, dtype=dtype)
    assert opened.adapter is not None
    base = base_of(opened.model)
    report = merge(opened.model, {opened.adapter.name: weight}, force=force)
    written = save_merged(
        opened.model, output_dir, base.tokenizer if base else None, overwrite=overwrite
    )
    if json:
        print(jsonlib.dumps({**asdict(report), "damage": report.damage, "path": str(written)}))
        return
    print(report)
    print(f"written: {written}")

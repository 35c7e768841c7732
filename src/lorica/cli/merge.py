"""Write an adapter into its base: a plain model folder that any tool loads.

The sum is taken in float32 and rounded once. How much of the adapter the rounding destroys is told
weight by weight, and written beside the model. The weights go from disk to disk, one at a time,
where the files of the base name them as the model does. Afterwards the new model is asked what base
and adapter were asked, and is kept only where it answers the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    adapter: Annotated[str, typer.Argument(help="a run folder or an adapter folder")],
    output_dir: Annotated[
        Path, typer.Option(help="a new folder for the merged model", metavar="PATH")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapter, where it has moved", show_default=False, metavar="PATH"
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="precision of the merged model: float32, bfloat16 or float16; as-stored: that of "
            "the base's files"
        ),
    ] = "as-stored",
    weight: Annotated[
        float, typer.Option(help="the adapter's share; 0.5 merges half of it", metavar="N")
    ] = 1.0,
    force: Annotated[
        bool,
        typer.Option("--force", help="merge even where rounding destroys a quarter of the adapter"),
    ] = False,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="of a quantized base: quantize the merged weights again, and tell how far the "
            "answers move",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a model that is in output_dir")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="ask the new model what base and adapter were asked, and keep it only where it "
            "answers the same",
        ),
    ] = True,
    json: Annotated[
        bool, typer.Option("--json", help="the report as one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys

    from lorica.cli.opening import adapter_folder
    from lorica.cli.voice import Voice
    from lorica.cli.writing import Order, write_merged
    from lorica.errors import AdapterFileError, BaseModelError

    if adapter_folder(Path(adapter)) is None:
        raise AdapterFileError(
            f"{adapter} is neither a run nor an adapter folder",
            expected="a folder with run.json or adapter_config.json",
        )
    if output_dir.exists() and not overwrite:
        raise BaseModelError(
            f"{output_dir} exists", mend="choose another --output-dir, or replace it: --overwrite"
        )
    order = Order(adapter, output_dir, model, dtype, weight, force, overwrite, verify, requantize)
    written = write_merged(order, Voice(quiet=json, stream=sys.stderr))
    if json:
        print(jsonlib.dumps(written.facts))
    else:
        print("\n".join(_lines(written, output_dir, requantize)))


def _lines(written: Any, folder: Path, requantize: bool) -> list[str]:
    """The damage of the rounding, the worst weights, and how the model is loaded."""
    from lorica.base.request import AUTO_CLASSES
    from lorica.cli.writing import REPORT
    from lorica.records.lines import worst_table

    report = written.report
    error = "error of quantizing" if requantize else "lost by rounding"
    lost = "is the error of quantizing" if requantize else "is lost by rounding"
    table = worst_table(
        report.merged,
        lambda weight: weight.damage,
        {
            "weight": lambda weight: weight.path,
            "stored as": lambda weight: weight.dtype,
            "update": lambda weight: f"{weight.update:.2e}",
            error: lambda weight: f"{weight.damage:.2%}",
            "elements changed": lambda weight: f"{weight.changed:.1%}",
        },
        f"weights with less; {folder / REPORT} has all",
    )
    return [
        f"merged into {len(report.merged)} weights; {report.damage:.2%} of the adapter {lost}",
        "",
        *table,
        *(f"untied from the input embedding: {path}" for path in report.untied),
        *([f"verified: {written.verified}"] if written.verified is not None else []),
        "",
        f"model  {folder}",
        f"load   transformers.{AUTO_CLASSES[written.kind]}.from_pretrained({str(folder)!r})",
        *(["       transformers needs bitsandbytes for it; lorica does not"] if requantize else []),
    ]

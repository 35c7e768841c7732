"""Write an adapter into its base: a plain model folder that any tool loads.

The sum is taken in float32 and rounded once. How much of the adapter the rounding destroys is told
weight by weight, and written beside the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

REPORT = "merge_report.json"
SHOWN = 10
"""So many weights are printed, those with the greatest damage; the report holds all."""


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
    json: Annotated[
        bool, typer.Option("--json", help="the report as one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys
    from dataclasses import asdict

    from transformers.utils import logging

    from lorica.cli.opening import adapter_folder, open_subject
    from lorica.cli.prepare import known
    from lorica.cli.voice import Voice
    from lorica.errors import AdapterFileError, BaseModelError
    from lorica.evaluate.requantized import how_far
    from lorica.files.quantized import save_base
    from lorica.files.whole import save_merged
    from lorica.mix import merge
    from lorica.records.atomic import write_file

    if adapter_folder(Path(adapter)) is None:
        raise AdapterFileError(
            f"{adapter} is neither a run nor an adapter folder",
            expected="a folder with run.json or adapter_config.json",
        )
    if output_dir.exists() and not overwrite:
        raise BaseModelError(
            f"{output_dir} exists", mend="choose another --output-dir, or replace it: --overwrite"
        )
    voice = Voice(quiet=json, stream=sys.stderr)
    with voice.work(f"loading {adapter}"):
        opened = open_subject(adapter, base=model, dtype=dtype)
    assert opened.adapter is not None
    logging.disable_progress_bar()  # of the writing, which would come among the lines below
    with voice.work("merging"):
        if requantize:
            moved = how_far(opened.model, {opened.adapter.name: weight})
            voice.say(str(moved))
        report = merge(
            opened.model, {opened.adapter.name: weight}, force=force, requantize=requantize
        )
        tokenizer = known(opened.model).tokenizer
        asked = {"format": opened.format, "system": opened.system, "task": opened.task.facts()}
        if requantize:
            save_base(opened.model, output_dir, facts=asked, overwrite=overwrite)
        else:
            save_merged(opened.model, output_dir, tokenizer, facts=asked, overwrite=overwrite)
    facts = {**asdict(report), "damage": report.damage, "path": str(output_dir)}
    write_file(output_dir / REPORT, jsonlib.dumps(facts, indent=2) + "\n")
    print(jsonlib.dumps(facts) if json else "\n".join(_lines(report, output_dir, opened.task.kind)))


def _lines(report: Any, folder: Path, kind: str) -> list[str]:
    """The damage of the rounding, the worst weights, and how the model is loaded."""
    from lorica.base.load import AUTO_CLASSES
    from lorica.records.lines import aligned

    worst = sorted(report.merged, key=lambda w: -w.damage)[:SHOWN]
    rows = [["weight", "dtype", "update", "lost by rounding", "elements changed"]]
    rows += [
        [w.path, w.dtype, f"{w.update:.2e}", f"{w.damage:.2%}", f"{w.changed:.1%}"] for w in worst
    ]
    more = len(report.merged) - len(worst)
    return [
        f"merged into {len(report.merged)} weights; {report.damage:.2%} of the adapter is lost by "
        "rounding",
        "",
        *aligned(rows),
        *([f"and {more} weights with less; {folder / REPORT} has all"] if more else []),
        *(f"untied from the input embedding: {path}" for path in report.untied),
        "",
        f"model  {folder}",
        f"load   transformers.{AUTO_CLASSES[kind]}.from_pretrained({str(folder)!r})",
    ]

"""Write a repaired copy of records, with a count for each step. The input is never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    data: Annotated[str, typer.Argument(help="records: a file, a folder or a hub id")],
    output: Annotated[
        Path, typer.Option(help="JSONL file to write the repaired records to", metavar="PATH")
    ],
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            help="evaluation records: what is in them is taken out of the training data; may be "
            "given several times",
            show_default=False,
            metavar="PATH",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="leave the first of rows that are the same")
    ] = True,
    near: Annotated[
        bool,
        typer.Option("--near/--no-near", help="leave the first of rows that are nearly the same"),
    ] = False,
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise/--no-normalise",
            help="canonical Unicode, plain line ends, no unseen control characters",
        ),
    ] = True,
    redact: Annotated[
        bool,
        typer.Option("--redact/--no-redact", help="replace secrets and personal data by [KIND]"),
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(help="format of the records; detected otherwise", show_default=False),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="columns of the data by their part: prompt=question,completion=answer",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="write over the output where it exists")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys
    from dataclasses import asdict

    from lorica.cli.voice import Voice
    from lorica.config import known_settings
    from lorica.config.text import parse_flag
    from lorica.data.clean import clean
    from lorica.data.read import read
    from lorica.errors import ConfigError, DataError
    from lorica.records.atomic import write_file

    if output.exists() and not replace:
        raise ConfigError(f"{output} exists", mend="another --output, or --replace")
    mapping = parse_flag("columns", columns, known_settings()) if columns else None
    how = {"format": format, "columns": mapping}
    voice = Voice(quiet=json, stream=sys.stderr)
    with voice.work("reading the data"):
        dataset = read(data, max_bad_rows=10**9, **how)
        against = [read(path, **how) for path in eval_data or ()]
    with voice.work("cleaning"):
        found = clean(
            dataset, against=against, normalise=normalise, exact=exact, near=near, redact=redact
        )
    if not len(found.dataset):
        raise DataError(f"nothing of {data} would be left", mend="see what lorica check says")
    lines = (jsonlib.dumps(row, ensure_ascii=False) + "\n" for row in found.dataset.rows)
    write_file(output, "".join(lines))
    if json:
        steps = [asdict(step) for step in found.steps]
        counts = {"read": len(dataset), "written": len(found.dataset)}
        told = {
            "output": str(output),
            "digest": found.dataset.digest,
            "statement": dataset.statement,
        }
        print(jsonlib.dumps({**told, **counts, "steps": steps}))
        return
    print(dataset.statement)
    for step in found.steps:
        print(f"{step.name:10} {step.text}")
    print(f"{len(found.dataset):,} of {len(dataset):,} rows written to {output}")

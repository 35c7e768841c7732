"""Score a run, an adapter or a base on records. An adapter is set beside its base, with an interval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    subject: Annotated[str, typer.Argument(help="run folder, adapter folder, or base model")],
    data: Annotated[str, typer.Option(help="records to score on")],
    model: Annotated[
        str | None,
        typer.Option(help="the adapter's base, where it is not where it was", show_default=False),
    ] = None,
    task: Annotated[
        str, typer.Option(help="of a bare base; an adapter knows its own")
    ] = "causal-lm",
    metrics: Annotated[
        str | None, typer.Option(help="scores, separated by commas", show_default=False)
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="columns by part: prompt=question,completion=answer", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="score so many records at most", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="records per batch")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(help="tokens to generate at most per record")
    ] = 128,
    dtype: Annotated[str, typer.Option(help="of the base: auto, float32, bfloat16")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="write every prediction to this JSONL file", show_default=False),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys
    from dataclasses import asdict

    from lorica.attach.activate import activate
    from lorica.cli.material import GENERATING, Material
    from lorica.cli.opening import open_subject
    from lorica.data.read import group_references, read
    from lorica.evaluate.compare import compare
    from lorica.evaluate.score import score
    from lorica.records.atomic import write_file

    mapping = dict(part.split("=", 1) for part in columns.split(",")) if columns else None
    records = read(data, columns=mapping)
    if records.format in GENERATING:
        records = group_references(records)
    material = Material(records, scored=records, most=limit)
    print(f"{len(records):,} records; {records.statement.splitlines()[0]}", file=sys.stderr)
    opened = open_subject(
        subject, base=model, task=task, dtype=dtype, max_new_tokens=max_new_tokens
    )
    material.task(opened.task.kind, subject)
    names = metrics.split(",") if metrics else list(material.metrics(opened.task.kind))
    how = {"batch_size": batch_size, "generate": material.generates}
    found = opened.task.predict(opened.model, material.test, **how)
    result: dict = {
        "subject": subject,
        "data": data,
        "digest": records.digest,
        "num_records": len(material.test),
    }
    if opened.adapter is None:
        scores = score(found, names)
        result["scores"] = {name: asdict(value) for name, value in scores.items()}
        lines = [
            f"{n}  {s.value:.4g}" + ("" if s.low is None else f"  ({s.low:.4g} to {s.high:.4g})")
            for n, s in scores.items()
        ]
    else:
        with activate(opened.model, None):
            before = opened.task.predict(opened.model, material.test, **how)
        pairs = compare(before, found, names)
        result["scores"] = {name: asdict(value) for name, value in pairs.items()}
        lines = [pair.sentence(name) for name, pair in pairs.items()]
    if output is not None:
        rows = [
            {"record": p.record, "output": p.output, "references": list(p.references), "nll": p.nll}
            for p in found
        ]
        write_file(output, "".join(jsonlib.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(jsonlib.dumps(result) if json else "\n".join(lines))

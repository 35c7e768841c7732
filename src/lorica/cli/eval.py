"""Score a run, an adapter or a base on records; an adapter beside its base, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorica.cli.together import AverageWith, StackOn, Weights


def command(
    subject: Annotated[str, typer.Argument(help="a run folder, an adapter folder or a base model")],
    data: Annotated[
        str,
        typer.Option(
            help="records to score on: a file, a folder, a hub id or embedded", metavar="PATH"
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="base of the adapter, where it has moved", show_default=False, metavar="PATH"
        ),
    ] = None,
    stack_on: StackOn = None,
    average_with: AverageWith = None,
    weights: Weights = None,
    task: Annotated[
        str,
        typer.Option(
            help="of a bare base: causal-lm, text-classification or seq2seq; auto: as its config "
            "says. An adapter knows its own"
        ),
    ] = "auto",
    metrics: Annotated[
        str | None,
        typer.Option(
            help="scores, with commas between; those of the task otherwise", show_default=False
        ),
    ] = None,
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
    limit: Annotated[
        int | None,
        typer.Option(
            help="score at most so many records, drawn at random",
            show_default=False,
            min=1,
            metavar="N",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of that draw", min=0, metavar="N")] = 0,
    batch_size: Annotated[int, typer.Option(help="records per batch", min=1, metavar="N")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(help="tokens to generate at most per record", min=1, metavar="N")
    ] = 128,
    dtype: Annotated[
        str, typer.Option(help="precision of the base: auto, float32 or bfloat16")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            help="write every prediction to this JSONL file", show_default=False, metavar="PATH"
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    import json as jsonlib
    import sys

    from lorica.base.known import known
    from lorica.cli.judge import tell_of_chance
    from lorica.cli.material import (
        Material,
        check_format,
        for_scoring,
        read_scored,
        with_system,
    )
    from lorica.cli.opening import open_subject
    from lorica.cli.together import join, others_of
    from lorica.cli.voice import Voice
    from lorica.config import known_settings
    from lorica.config.text import parse_flag
    from lorica.evaluate.metrics import find_metrics

    voice = Voice(quiet=json, stream=sys.stderr)
    names = [name.strip() for name in metrics.split(",")] if metrics else []
    find_metrics(names or ["loss"])  # a wrong name is told before anything is loaded
    others = others_of(subject, stack_on, average_with, weights)
    mapping = parse_flag("columns", columns, known_settings()) if columns else None
    records = read_scored(data, columns=mapping, format=format)
    voice.say(f"data: {records.statement}")
    with voice.work(f"loading {subject}"):
        opened = open_subject(
            subject,
            base=model,
            task=task,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            records=records,
        )
        join(opened, others)
    check_format(records, opened.task.kind)
    for note in opened.notes:
        voice.say(note)
    chosen, why = for_scoring(with_system(records, opened.system), limit, seed)
    if why:
        voice.say(f"scores: on {why}")
    tell_of_chance(known(opened.model), voice, alone=opened.adapter is None)
    material = Material(records, scored=chosen)
    scores, lines, found = _scores(opened, material, names, batch_size, voice)
    if output is not None:
        _write(output, found, getattr(opened.task, "labels", ()))
        voice.say(f"predictions: {output}")
    if json:
        head = {"subject": subject, "data": data, "digest": chosen.digest}
        print(jsonlib.dumps({**head, "num_records": len(chosen), "scores": scores}))
    else:
        print("\n".join(lines))


def _scores(
    opened: Any, material: Any, names: list[str], batch_size: int, voice: Any
) -> tuple[dict[str, Any], list[str], list[Any]]:
    """The scores as plain values and as lines, and what the subject said."""
    from dataclasses import asdict

    from lorica.cli.judge import predictions
    from lorica.cli.showing import comparison_lines, score_lines
    from lorica.evaluate.compare import compare
    from lorica.evaluate.score import score

    how = {"generate": material.generates, "batch_size": batch_size}
    given = (opened.task, material.test, voice)
    metrics = names or list(material.metrics(opened.task.kind))
    found = predictions(opened.model, opened.mixture, *given, **how)
    if opened.adapter is None:
        alone = score(found, metrics)
        return {name: asdict(value) for name, value in alone.items()}, score_lines(alone), found
    before = predictions(opened.model, None, *given, **how)
    pairs = compare(before, found, metrics)
    return {name: asdict(value) for name, value in pairs.items()}, comparison_lines(pairs), found


def _write(file: Path, found: list[Any], labels: tuple[str, ...]) -> None:
    from lorica.cli.judge import output_text
    from lorica.records.atomic import write_file
    from lorica.records.folder import json_line

    rows = [
        {
            "record": p.record,
            "output": None if p.output is None else output_text(p.output, labels),
            "references": [output_text(reference, labels) for reference in p.references],
            "nll": p.nll,
        }
        for p in found
    ]
    write_file(file, b"".join(json_line(row) for row in rows))

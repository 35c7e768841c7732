"""Results as people read them in a terminal or a log: a table of scores, samples side by side."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.records.card import merges
from lorica.records.lines import aligned, score_table
from lorica.records.phrases import count, decimals, fixed, metric_name, verdict
from lorica.records.read import read_manifest

if TYPE_CHECKING:  # `lorica train` shows no scores before it has some
    from lorica.evaluate.compare import Comparison
    from lorica.evaluate.score import Score


def comparison_lines(scores: Mapping[str, Comparison]) -> list[str]:
    """The verdict on the first metric, then a table of all."""
    rows = {name: asdict(found) for name, found in scores.items()}
    first = next(iter(rows))
    return [
        f"{verdict(first, rows[first]).headline} in {metric_name(first)}",
        *score_table(rows),
    ]


def score_lines(scores: Mapping[str, Score]) -> list[str]:
    """A table of the scores of one model."""
    rows = [("metric", "score", "95 % interval", "records")]
    for name, found in scores.items():
        digits = decimals(abs(found.value))
        interval = (
            "–"
            if found.low is None or found.high is None
            else f"{fixed(found.low, digits)} to {fixed(found.high, digits)}"
        )
        value = fixed(found.value, digits)
        rows.append((metric_name(name), value, interval, count(found.num_records)))
    return aligned(rows)


def sample_lines(samples: Sequence[Mapping], most: int) -> list[str]:
    """What was asked, and what was answered before and after."""
    lines = []
    for sample in samples[:most]:
        lines += ["", f"  input      {one_line(sample['input'])}"]
        lines += [f"  before     {one_line(sample['before'])}"]
        lines += [f"  after      {one_line(sample['after'])}"]
        lines += [f"  reference  {one_line(text)}" for text in sample["references"][:1]]
    return lines


def one_line(text: str) -> str:
    """A text in one line, as wide as the terminal has room; 160 letters where there is none."""
    room = max(40, shutil.get_terminal_size((174, 24)).columns - 14)
    text = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return text if len(text) <= room else text[: room - 3] + "..."


def closing_lines(folder: Path, samples: Sequence[Mapping], *, most: int = 2) -> list[str]:
    """The end of a run: some samples, where the results lie, and what to type next."""
    run, manifest = shlex.quote(str(folder)), read_manifest(folder / "run.json")
    into_base = all(merges(manifest, name) for name in manifest.get("adapters", {}))
    lines = [
        *sample_lines(samples, most),
        "",
        f"adapter  {folder / 'adapter'}",
        f"report   {folder / 'report.html'}",
        f"next     lorica chat {run}",
        f"         lorica eval {run} --data FILE",
    ]
    return lines + [f"         lorica merge {run} --output-dir FOLDER"] * into_base

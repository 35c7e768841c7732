"""What a run shows where there is no terminal: plain lines for people, JSON lines for machines."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TypeVar

from lorica.records.folder import json_line
from lorica.records.phrases import (
    clock,
    count,
    duration,
    loss_text,
    metric_name,
    number,
    rate,
    score_cells,
    size,
    verdict,
)
from lorica.records.progress import Progress
from lorica.records.stream import SurvivingStream

Item = TypeVar("Item")

WORST_SHOWN = 10
"""Rows of a table of the worst; the report beside the result holds all."""

ENDINGS = {"finished": "✓", "interrupted": "■", "failed": "✗"}


class JsonLines:
    """One JSON object a line, each with "type": start, step, event, work or finish."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = SurvivingStream(stream)
        self._pace = _Pace(seconds=10)

    def start(self, manifest: dict) -> None:
        self._write("start", {"manifest": manifest})

    def step(self, row: dict) -> None:
        self._write("step", row)

    def event(self, kind: str, text: str) -> None:
        self._write("event", {"kind": kind, "text": text})

    def work(self, what: str | None, done: int = 0, total: int = 0) -> None:
        """Outside of the steps: {"type": "work", "what", "done", "total"} where something begins,
        and at most every ten seconds.
        """
        if self._pace.due(what):
            self._write("work", {"what": what, "done": done, "total": total or None})

    def finish(self, summary: dict) -> None:
        self._write("finish", {"summary": summary})

    def _write(self, kind: str, value: dict) -> None:
        self._stream.write(json_line({"type": kind, **value}).decode())
        self._stream.flush()


class PlainLines:
    """One line of text per row and event; with `quiet`, only warnings and the verdicts."""

    def __init__(self, stream: IO[str], *, quiet: bool = False) -> None:
        self._stream = SurvivingStream(stream)
        self._quiet = quiet
        self._progress = Progress()
        self._pace = _Pace(seconds=30)

    def start(self, manifest: dict) -> None:
        self._progress.start(manifest)
        if not self._quiet:
            self._line(title(manifest))

    def step(self, row: dict) -> None:
        self._progress.take(row)
        if not self._quiet:
            self._line(row_line(row, self._progress))

    def event(self, kind: str, text: str) -> None:
        if kind == "warning":
            self._line(f"warning: {text}")
        elif not self._quiet:
            self._line(text)

    def work(self, what: str | None, done: int = 0, total: int = 0) -> None:
        """What is done outside of the steps and can be counted: a line where it begins, and every
        half a minute.
        """
        if self._pace.due(what) and total and not self._quiet:
            self._line(f"{what} ..." + (f" {count(done)} done" if done else ""))

    def finish(self, summary: dict) -> None:
        if not self._quiet:
            self._line(ending(summary, self._progress))
        for adapter, scores in scores_by_adapter(summary):
            sentences = [f"{adapter}{verdict(*item).sentence}" for item in scores.items()]
            table = [] if self._quiet or len(scores) < 2 else score_table(scores)
            for line in [*sentences[:1], *table] if table else sentences:
                self._line(line)

    def _line(self, text: str) -> None:
        self._stream.write(printable(text) + "\n")
        self._stream.flush()


class _Pace:
    """When to tell of work again: where it begins, and after so many seconds."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds, self._told = seconds, 0.0
        self._what: str | None = None

    def due(self, what: str | None) -> bool:
        fresh, now = what != self._what, time.monotonic()
        self._what = what
        if what is None or not (fresh or now - self._told >= self._seconds):
            return False
        self._told = now
        return True


def title(manifest: dict) -> str:
    """What is trained, on what, and where it goes."""
    adapters = [name for name in manifest.get("adapters", {}) if name != "default"]
    words = "training " + (", ".join(adapters[:3]) or "an adapter")
    words += f" and {len(adapters) - 3} more" if len(adapters) > 3 else ""
    base, run = manifest.get("base", {}).get("name"), manifest.get("run", {}).get("path")
    words += f" on {base}" if base else ""
    return printable(words + (f" → {run}" if run else ""))


def row_line(row: dict, progress: Progress) -> str:
    """What a row says, in one line."""
    step = f"step {row.get('step')}" + (f"/{progress.max_steps}" if progress.max_steps else "")
    parts = [step]
    if row.get("adapter") and len(progress.tracks) > 1:
        parts.append(str(row["adapter"]))
    for key, label, words in (
        ("epoch", "epoch", lambda value: f"{value:.2f}"),
        ("loss", "loss", loss_text),
        ("eval_loss", "eval_loss", loss_text),
        ("learning_rate", "lr", rate),
        ("grad_norm", "grad_norm", loss_text),
        ("tokens_per_second", "tokens/s", count),
        ("memory_bytes", "memory", size),
    ):
        if row.get(key) is not None:
            parts.append(f"{label} {words(row[key])}")
    others = [key for key in row if key.startswith("eval_") and key != "eval_loss"]
    parts += [f"{key} {loss_text(row[key])}" for key in others if number(row[key]) is not None]
    left = progress.seconds_left
    return "  ".join([*parts, f"left {clock(left)}"] if left is not None else parts)


def ending(summary: dict, progress: Progress, *, mark: bool = False) -> str:
    """How the run ended: after what time in all, how long it trained, in how many steps; with
    `mark`, a sign before it.
    """
    status = str(summary.get("status", "finished"))
    resources = summary.get("resources", {})
    why = summary.get("stopped_because")
    parts = [f"{status} after {duration(resources.get('total_seconds', progress.elapsed))}"]
    if resources.get("seconds") is not None:
        parts.append(f"trained for {duration(resources['seconds'])}")
    parts.append(f"{count(progress.step)} steps")
    if resources.get("tokens_per_second"):
        parts.append(f"{count(resources['tokens_per_second'])} tokens/s")
    if resources.get("peak_memory_bytes"):
        planned = resources.get("planned_memory_bytes")
        beside = f" (planned {size(planned)})" if planned else ""
        parts.append(f"peak {size(resources['peak_memory_bytes'])}{beside}")
    if why:
        parts.append(str(why))
    return printable((f"{ENDINGS.get(status, '■')} " if mark else "") + " · ".join(parts))


def scores_by_adapter(summary: dict) -> list[tuple[str, dict]]:
    """(prefix, scores) of the run, or of each adapter where the adapters carry their own."""
    found = [("", summary["scores"])] if summary.get("scores") else []
    for name, adapter in summary.get("adapters", {}).items():
        if isinstance(adapter, dict) and adapter.get("scores"):
            found.append((f"{name}: ", adapter["scores"]))
    return found


def score_table(scores: Mapping[str, Mapping]) -> list[str]:
    """All scores of base and tuned, in columns."""
    rows = [["metric", "base", "tuned", "difference", "95 % interval", "p", "records"]]
    for name, score in scores.items():
        cells = score_cells(score)
        values = [cells[key] for key in ("base", "tuned", "difference", "interval", "p")]
        rows.append([metric_name(name), *values, count(score.get("num_records"))])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> list[str]:
    """Rows with a head as lines: the first column to the left unless `left` names others, the rest
    to the right.
    """
    left = left or rows[0][:1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "   ".join(
            cell.ljust(width) if title in left else cell.rjust(width)
            for title, cell, width in zip(rows[0], row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def worst_table(
    items: Sequence[Item],
    badness: Callable[[Item], float],
    columns: Mapping[str, Callable[[Item], str]],
    others: str,
) -> list[str]:
    """The ten worst of the layers that a report tells of, and how many `others` there are besides.

    Args:
        badness: what they are ordered by, the greatest first.
        columns: title -> what stands below it for a layer.
        others: the words behind the number of those that are left out.
    """
    worst = sorted(items, key=lambda item: -badness(item))[:WORST_SHOWN]
    rows = [[*columns], *([cell(item) for cell in columns.values()] for item in worst)]
    left_out = len(items) - len(worst)
    return [*aligned(rows), *([f"and {left_out} {others}"] if left_out else [])]


def printable(text: str) -> str:
    """Without control characters: what came from data must not steer a terminal."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text)

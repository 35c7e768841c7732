"""What a run shows where there is no terminal: plain lines for people, JSON lines for machines."""

from typing import IO

from lorica.records.folder import json_line
from lorica.records.phrases import (
    clock,
    count,
    duration,
    loss_text,
    number,
    rate,
    size,
    verdict,
)
from lorica.records.progress import Progress
from lorica.records.stream import SurvivingStream

ENDINGS = {"finished": "✓", "interrupted": "■", "failed": "✗"}


class JsonLines:
    """One JSON object a line, each with "type": start, step, event or finish."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = SurvivingStream(stream)

    def start(self, manifest: dict) -> None:
        self._write("start", {"manifest": manifest})

    def step(self, row: dict) -> None:
        self._write("step", row)

    def event(self, kind: str, text: str) -> None:
        self._write("event", {"kind": kind, "text": text})

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

    def start(self, manifest: dict) -> None:
        self._progress.start(manifest)
        if not self._quiet:
            self._line(title(manifest))

    def step(self, row: dict) -> None:
        self._progress.take(row)
        if not self._quiet:
            self._line(row_line(row, self._progress))

    def event(self, kind: str, text: str) -> None:
        if kind == "warning" or not self._quiet:
            self._line(f"{kind}: {text}")

    def finish(self, summary: dict) -> None:
        if not self._quiet:
            self._line(ending(summary, self._progress))
        for adapter, scores in scores_by_adapter(summary):
            for metric, score in scores.items():
                self._line(f"{adapter}{verdict(metric, score).sentence}")

    def _line(self, text: str) -> None:
        self._stream.write(printable(text) + "\n")
        self._stream.flush()


def title(manifest: dict) -> str:
    """What is trained, on what, and where it goes."""
    adapters = list(manifest.get("adapters", {}))
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
    """How the run ended, after what time and how many steps; with `mark`, a sign before it."""
    status = str(summary.get("status", "finished"))
    resources = summary.get("resources", {})
    why = summary.get("stopped_because")
    parts = [f"{status} after {duration(resources.get('seconds', progress.elapsed))}"]
    parts.append(f"{count(progress.step)} steps")
    if resources.get("tokens_per_second"):
        parts.append(f"{count(resources['tokens_per_second'])} tokens/s")
    if resources.get("peak_memory_bytes"):
        parts.append(f"peak {size(resources['peak_memory_bytes'])}")
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


def printable(text: str) -> str:
    """Without control characters: what came from data must not steer a terminal."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text)

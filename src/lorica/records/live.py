"""What a run shows while it trains: a live screen on a terminal, plain lines elsewhere, JSON lines
for machines.
"""

import atexit
import os
import sys
import threading
from collections import deque
from itertools import pairwise
from typing import IO, Protocol, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorica.records.lines import JsonLines, PlainLines, ending, printable, scores_by_adapter, title
from lorica.records.phrases import (
    clock,
    count,
    loss_text,
    metric_name,
    rate,
    score_cells,
    size,
    verdict,
)
from lorica.records.progress import Progress, Track
from lorica.records.stream import SurvivingStream
from lorica.records.write import Recorder

EVENTS_SHOWN, ADAPTERS_SHOWN, CURVE_WIDTH = 5, 10, 40
LABEL_WIDTH, VALUE_WIDTH = 11, 12
MARKS = {"warning": "⚠", "checkpoint": "▪", "best": "★", "evaluation": "≈", "info": "·"}
STYLES = {"warning": "yellow", "best": "green", "better": "green", "worse": "red"}
_LABEL = "dim"


class Display(Recorder, Protocol):
    """A recorder that people or machines watch. Events may come before the start."""

    def work(self, what: str | None, done: int = 0, total: int = 0) -> None:
        """What is done outside of the steps, and how far it is; None: it is over."""
        ...


def display_for(
    stream: IO[str] | None = None, *, json: bool = False, quiet: bool = False
) -> Display:
    """The display that fits `stream` (standard output by default).

    JSON lines where `json`; warnings only where `quiet`; a live screen on a terminal; plain lines
    elsewhere.
    """
    chosen: IO[str] = sys.stdout if stream is None else stream
    if json:
        return JsonLines(chosen)
    if quiet:
        return PlainLines(chosen, quiet=True)
    if SurvivingStream(chosen).isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return LiveDisplay(chosen)
    return PlainLines(chosen)


class LiveDisplay:
    """A screen of a few lines that is redrawn four times a second, and a last one that stays.

    Colours follow NO_COLOR. The cursor comes back however the process ends, short of a kill.
    """

    def __init__(self, stream: IO[str], *, console: Console | None = None) -> None:
        self._console = console or Console(
            file=cast(IO[str], SurvivingStream(stream)), highlight=False
        )
        self._progress = Progress()
        self._manifest: dict = {}
        self._events: deque[tuple[str, str]] = deque(maxlen=EVENTS_SHOWN)
        self._warnings: list[str] = []
        self._work: tuple[str, int, int] | None = None
        # rows come from the training, frames are drawn by rich's thread
        self._guard = threading.RLock()
        self._live = Live(get_renderable=self.frame, console=self._console, refresh_per_second=4)
        self._early = Live(  # before the first step
            get_renderable=self._work_bar,
            console=self._console,
            refresh_per_second=8,
            transient=True,
        )

    def start(self, manifest: dict) -> None:
        with self._guard:
            self._manifest = manifest
            self._progress.start(manifest)
        self._early.stop()
        atexit.register(self._stop)
        self._live.start()

    def step(self, row: dict) -> None:
        with self._guard:
            self._progress.take(row)

    def event(self, kind: str, text: str) -> None:
        text = printable(text)
        if not self._live.is_started:  # before the start (loading) or after the end
            self._console.print(_event_line(kind, text))
            return
        with self._guard:
            self._events.append((kind, text))
            if kind == "warning":
                self._warnings.append(text)

    def work(self, what: str | None, done: int = 0, total: int = 0) -> None:
        """Show what is done outside of the steps, with a bar; None ends it."""
        with self._guard:
            begins = what is not None and (self._work is None or self._work[0] != what)
            self._work = None if what is None else (what, done, total)
        if self._live.is_started:
            if begins:
                self._live.refresh()
        elif what is None:
            self._early.stop()
        elif not self._early.is_started:
            atexit.register(self._stop)
            self._early.start(refresh=True)

    def finish(self, summary: dict) -> None:
        with self._guard:
            self._events.clear()
            self._work = None
        self._stop()
        self._console.print(self.last_screen(summary))

    def frame(self) -> RenderableType:
        """The screen now."""
        with self._guard:
            parts: list[RenderableType] = [
                Text(title(self._manifest), style="bold", overflow="ellipsis", no_wrap=True),
                self._bar(),
                "",
                *self._numbers(),
            ]
            if self._events:
                parts += ["", *(_event_line(kind, text) for kind, text in self._events)]
            if self._work is not None:
                parts += ["", self._work_bar()]
            return Group(*parts)

    def last_screen(self, summary: dict) -> RenderableType:
        """Ending, warnings, scores."""
        status = str(summary.get("status", "finished"))
        style = {"finished": "green", "failed": "red"}.get(status, "yellow")
        parts: list[RenderableType] = [
            "",
            Text(ending(summary, self._progress, mark=True), style=f"bold {style}"),
        ]
        parts += [_event_line("warning", text) for text in self._warnings]
        for adapter, scores in scores_by_adapter(summary):
            parts += ["", *_score_screen(adapter, scores)]
        return Group(*parts)

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        for live in (self._early, self._live):
            if live.is_started:
                live.stop()

    def _work_bar(self) -> RenderableType:
        with self._guard:
            what, done, total = self._work or ("", 0, 0)
        if not what:
            return Text("")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(what, overflow="ellipsis", no_wrap=True),
            ProgressBar(total=total or 1, completed=done, width=24, pulse=not done),
            Text(f"{count(done)}/{count(total)}" if done else "", style=_LABEL),
        )
        return grid

    def _bar(self) -> RenderableType:
        progress = self._progress
        total = progress.max_steps
        bar = ProgressBar(
            total=total or 1, completed=min(progress.step, total or 1), width=None, pulse=not total
        )
        share = f"{100 * progress.step / total:.0f} %" if total else ""
        left = progress.seconds_left
        cells = [
            bar,
            Text(f"{count(progress.step)}/{count(total) if total else '?'}", style="bold"),
            Text(share),
            Text(f"epoch {progress.epoch:.2f}" if progress.epoch is not None else "", style=_LABEL),
            Text(f"{clock(progress.elapsed)} gone", style=_LABEL),
            Text(f"{clock(left)} left" if left is not None else ""),
        ]
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        for _ in cells[1:]:
            grid.add_column(no_wrap=True, justify="right")
        grid.add_row(*cells)
        return grid

    def _numbers(self) -> list[RenderableType]:
        tracks = self._progress.tracks
        if not tracks:
            return [Text("waiting for the first step", style=_LABEL)]
        if len(tracks) > 1:
            return [_track_table(tracks), "", self._machine()]
        return [_one_track(next(iter(tracks.values()))), self._machine()]

    def _machine(self) -> RenderableType:
        row, peak = self._progress.row, self._progress.peak_memory
        return Text.assemble(
            ("tokens/s".ljust(LABEL_WIDTH), _LABEL),
            count(row.get("tokens_per_second")).ljust(VALUE_WIDTH),
            ("tokens ", _LABEL),
            f"{count(row.get('tokens'))}   ",
            ("memory ", _LABEL),
            size(row.get("memory_bytes")),
            (f" (peak {size(peak)})" if peak else "", _LABEL),
        )


def _one_track(track: Track) -> RenderableType:
    row = track.latest
    grid = Table.grid()
    for width in (LABEL_WIDTH, VALUE_WIDTH, None):
        grid.add_column(no_wrap=True, min_width=width)
    best = (
        f"best {loss_text(track.best)} at step {count(track.best_step)}"
        if track.best is not None
        else ""
    )
    is_best = track.best is not None and track.eval_loss == track.best
    grid.add_row(
        Text("loss", style=_LABEL), _loss(track), Text(_curve(track.history), style="cyan")
    )
    grid.add_row(
        Text("eval loss", style=_LABEL),
        Text(
            loss_text(track.eval_loss) + (" ★" if is_best else ""),
            style="bold green" if is_best else "bold",
        ),
        Text("   ".join(filter(None, (best, _other_scores(row)))), style=_LABEL),
    )
    grid.add_row(
        Text("lr", style=_LABEL),
        Text(rate(row.get("learning_rate"))),
        Text.assemble(("grad norm ", _LABEL), loss_text(row.get("grad_norm"))),
    )
    return grid


def _track_table(tracks: dict[str, Track]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=_LABEL)
    for name in ("adapter", "loss", "eval loss", "best", "lr", "grad norm"):
        table.add_column(name, justify="left" if name == "adapter" else "right", no_wrap=True)
    for name, track in list(tracks.items())[:ADAPTERS_SHOWN]:
        best = "" if track.best is None else f"{loss_text(track.best)} @ {count(track.best_step)}"
        table.add_row(
            Text(printable(name)),
            _loss(track),
            loss_text(track.eval_loss),
            best,
            rate(track.latest.get("learning_rate")),
            loss_text(track.latest.get("grad_norm")),
        )
    if len(tracks) > ADAPTERS_SHOWN:
        table.add_row(Text(f"and {len(tracks) - ADAPTERS_SHOWN} more", style=_LABEL))
    return table


def _loss(track: Track) -> Text:
    arrow, style = {-1: ("↘", "green"), 1: ("↗", "yellow"), 0: ("→", _LABEL)}[track.trend]
    return Text.assemble((loss_text(track.mean.value), "bold"), " ", (arrow, style))


def _curve(history: list[float]) -> str:
    """The smoothed loss so far in block characters, each the mean of its part of the history."""
    if len(history) < 2:
        return ""
    width = min(CURVE_WIDTH, len(history))
    edges = [index * len(history) // width for index in range(width + 1)]
    means = [sum(history[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def _other_scores(row: dict) -> str:
    names = [key for key in row if key.startswith("eval_") and key != "eval_loss"]
    return "  ".join(f"{metric_name(name)} {loss_text(row[name])}" for name in names)


def _event_line(kind: str, text: str) -> RenderableType:
    style = STYLES.get(kind, "")
    grid = Table.grid(padding=(0, 1))  # so that a long text hangs behind its mark
    grid.add_row(
        Text(MARKS.get(kind, "·"), style=style),
        Text(text, style=style if kind == "warning" else ""),
    )
    return grid


def _score_screen(adapter: str, scores: dict) -> list[RenderableType]:
    metric, score = next(iter(scores.items()))
    judged = verdict(metric, score)
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=_LABEL)
    for name in ("metric", "base", "tuned", "difference", "95 % interval", "records"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name, values in scores.items():
        cells = score_cells(values)
        table.add_row(
            Text(printable(metric_name(name))),
            cells["base"],
            Text(cells["tuned"], style="bold"),
            Text(cells["difference"], style=STYLES.get(verdict(name, values).kind, "")),
            cells["interval"] or "–",
            count(values.get("num_records")),
        )
    words = f"{adapter}{judged.headline} in {metric_name(metric)}"
    sentence = Text(printable(words), style=f"bold {STYLES.get(judged.kind, 'yellow')}")
    return [sentence, table]

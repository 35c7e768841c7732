"""What a run says: before it trains, while it trains, and after. One display for all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from lorica.records.folder import RunFolder
from lorica.records.live import display_for
from lorica.records.read import read_lines
from lorica.records.watch import Watched
from lorica.records.write import Recorder, Recorders, RunRecorder


class Voice:
    """Tells people or machines what happens, and writes the same into the run folder.

    What is said before the folder's recorder is made is kept, and goes into events.jsonl then.

    Args:
        json: one JSON object a line.
        quiet: warnings and the result only.
        stream: standard output by default.
    """

    def __init__(
        self, *, json: bool = False, quiet: bool = False, stream: IO[str] | None = None
    ) -> None:
        self.display = display_for(stream, json=json, quiet=quiet)
        self.writer: RunRecorder | None = None
        self._early: list[tuple[str, str]] = []

    def say(self, text: str, kind: str = "info") -> None:
        """Tell an event: kind is "info" or "warning"."""
        self.display.event(kind, text)
        if self.writer is None:
            self._early.append((kind, text))
        else:
            self.writer.event(kind, text)

    @contextmanager
    def work(self, what: str, total: int = 0) -> Iterator[Callable[[int], None]]:
        """Something that takes a while; yields a function that takes how much of it is done."""
        self.display.work(what, 0, total)
        try:
            yield lambda done: self.display.work(what, done, total)
        finally:
            self.display.work(None)

    def recorder(self, folder: RunFolder, config: str, step: int | None) -> Recorder:
        """What the training loop tells its steps to: the display and the files of the folder.

        Args:
            config: text of config.yaml.
            step: that is gone on from; None for a new run.
        """
        return Watched(Recorders([self.writing(folder, config, step), self.display]))

    def writing(self, folder: RunFolder, config: str, step: int | None = None) -> RunRecorder:
        """The files alone, for a run that the display does not show; arguments as of `recorder`."""
        self.writer = RunRecorder(folder, config=config, resumed_step=step)
        told = {event.get("text") for event in read_lines(folder.events).values}
        for kind, text in self._early:
            if text not in told:  # a resumed run says most of it again
                self.writer.event(kind, text)
        return self.writer

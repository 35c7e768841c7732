"""`torchrun ... -m lorica train run.yaml --shard-base`: one run, made by all processes together.

Every process runs the same program on the same records. The first one is the run that the user
sees; the others are silent and write into a folder that is thrown away in the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorica.base.processes import Processes, first_line, is_gone, joined
from lorica.cli.one_voice import speaks
from lorica.cli.ranks import Ranks
from lorica.cli.run import Outcome, execute
from lorica.cli.several import closing_lines_of_several, execute_several
from lorica.cli.showing import closing_lines
from lorica.cli.spread import check_spread
from lorica.config import Resolved
from lorica.errors import Interrupted, LoricaError
from lorica.records.folder import (
    ADAPTER,
    ADAPTERS,
    CHECKPOINTS,
    LOCK,
    PICTURES,
    REPORT,
    SAMPLES,
    STAGES,
    WORKERS,
    how_to_resume,
)
from lorica.records.read import read_manifest
from lorica.train.checkpoint import newest_whole

_UNREAD = (CHECKPOINTS, LOCK, REPORT, SAMPLES, PICTURES, ADAPTER, ADAPTERS, STAGES, WORKERS)
"""What of a run folder nobody reads who goes on with the run; of the checkpoints the newest is."""


def execute_spread(
    settings: Resolved,
    found: Ranks,
    *,
    resume: Path | None,
    discard: bool,
    quiet: bool,
    json: bool,
    ignore_memory: bool,
) -> None:
    """What one of several processes does for a run; arguments as of `execute`.

    Raises:
        LoricaError: as of a run by one process; or another process is gone.
    """
    check_spread(settings, found.size)
    how: dict[str, Any] = {"ignore_memory": ignore_memory, "json": False, "quiet": True}
    with joined(found.rank, found.size) as processes:
        if not processes.first:
            _silently(settings, processes, resume, how)
            return
        with _others(resume or settings.run.output_dir, found.size):
            for _ in range(2 * (resume is not None)):  # the others copy the run in between
                processes.wait()
            how |= {"resume": resume, "discard": discard, "quiet": quiet, "json": json}
            outcome = _execute(settings, how)
            processes.wait()
    if not (json or quiet):
        several = bool(settings.adapters)
        end = closing_lines_of_several if several else closing_lines
        more = () if several else (outcome.samples,)
        print("\n".join(end(outcome.folder, *more)))


def _execute(settings: Resolved, how: dict[str, Any]) -> Outcome:
    return (execute_several if settings.adapters else execute)(settings, **how)


def _silently(
    settings: Resolved, processes: Processes, resume: Path | None, how: dict[str, Any]
) -> None:
    """The same run in a folder that nobody sees. What goes wrong here and not in the first process
    is told; where it goes wrong there too, torchrun ends this process meanwhile.
    """
    with TemporaryDirectory(prefix="lorica-") as name:
        path, words = Path(name) / "run", StringIO()
        try:
            with redirect_stdout(words), redirect_stderr(words):
                if resume is not None:
                    processes.wait()
                    _copy(resume, path)
                    processes.wait()
                run = settings.run.model_copy(update={"output_dir": str(path)})
                own = replace(settings, run=run)
                begun = path if resume is not None else None
                if not _is_finished(path):
                    _execute(
                        own,
                        {**how, "resume": begun, "discard": False},
                    )
                processes.wait()
        except Interrupted as asked:
            shutil.rmtree(name, ignore_errors=True)
            if asked.together:  # torchrun ends the first one, which saves, once another has ended
                with suppress(RuntimeError):  # it is gone: it has saved
                    processes.wait()
            raise SystemExit(asked.exit_code) from None
        except Exception as error:
            shutil.rmtree(name, ignore_errors=True)
            if isinstance(error, LoricaError):  # the command line asks whether to say it
                error.what = f"process {processes.rank}: {error.what}"
            elif not speaks(error):
                raise SystemExit(1) from None
            raise


def _copy(run: Path, to: Path) -> None:
    """What a process reads that goes on with a run; of the checkpoints the newest whole one."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(*_UNREAD))
    checkpoints = run / CHECKPOINTS
    if (step := newest_whole(checkpoints)) is not None:
        shutil.copytree(step, to / CHECKPOINTS / step.name)


def _is_finished(path: Path) -> bool:
    manifest = path / "run.json"
    return manifest.is_file() and read_manifest(manifest).get("status") == "finished"


@contextmanager
def _others(path: str | Path | None, size: int) -> Iterator[None]:
    """Tell in a sentence where another process is gone, which torch says in many."""
    try:
        yield
    except RuntimeError as error:
        if not is_gone(error):
            raise
        where = f"go on with: {how_to_resume(Path(path))}" if path else None
        raise LoricaError(
            f"one of the {size} processes that hold the base is gone, so the others end too: "
            f"{first_line(error)}",
            expected="what it said itself, if it could, stands above or below",
            mend=where,
        ) from error

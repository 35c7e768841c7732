"""`stages:` of a run: several trainings, each on top of the last, in one run folder.

output_dir/stages/1/  2/ ...   a run folder for every stage, each the base of the next
output_dir/adapter/            all stages, as the last one left them
output_dir/metrics.jsonl ...   what the stages wrote, one after the other, and their page

Every stage is a whole run: it is scored, can be stopped and gone on with, and keeps the one before
it as it is. The folder as a whole is a run too, for `eval`, `chat`, `merge`, `report`, `--resume`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica import __version__
from lorica.attach.stages import check_methods
from lorica.cli.anchoring import anchored
from lorica.cli.run import Outcome, dress, execute, finished
from lorica.cli.seeds import over_saved
from lorica.cli.start import check_start
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import AdapterFileError, Interrupted, LoricaError
from lorica.files.adapter import CONFIG
from lorica.files.folder import new_folder
from lorica.records.atomic import write_file
from lorica.records.folder import STAGES, RunFolder, json_line, json_text, now
from lorica.records.read import read_lines, read_manifest
from lorica.records.stages import entry
from lorica.records.write import write_end


def execute_stages(
    settings: Resolved, *, resume: Path | None, discard: bool, quiet: bool, json: bool, **how: Any
) -> Outcome:
    """Train every stage, then make one run of them.

    Args:
        resume: the folder to go on with.
        discard: throw away an earlier run in the output folder.
        quiet, json, how: as for one run.

    Raises:
        LoricaError: as of one run; and stages that cannot lie on each other.
    """
    voice = Voice(json=json, quiet=quiet)
    if resume is not None and (outcome := finished(resume, settings, voice)):
        return outcome
    path = resume or Path(settings.run.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    check_stages_of(settings)
    if resume is None:
        RunFolder.check(path, replace=discard)
    held = RunFolder.open(path) if resume else RunFolder.create(path, replace=discard)
    with held as folder:
        if resume is None:
            _begin(folder, settings)
        how = {**how, "quiet": quiet, "json": json}
        outcome = _train(folder, settings, voice, how)
    return Outcome(path, outcome.scores, outcome.samples)


def stages_of(settings: Resolved, path: Path) -> dict[Path, Resolved]:
    """Folder of each stage -> the settings of its run, each on top of the last."""
    found: dict[Path, Resolved] = {}
    for number, stage in enumerate(settings.stages, 1):
        folder = (path / STAGES / str(number)).absolute()
        changes: dict[str, Any] = {"output_dir": str(folder), "stages": None}
        origins = {**stage.origins, "output_dir": settings.origins["stages"], "stages": "default"}
        if found:
            changes["on_adapter"] = str(list(found)[-1])
            origins["on_adapter"] = settings.origins["stages"]
        run = stage.run.model_copy(update=changes)
        found[folder] = replace(stage, run=run, origins=origins)
    return found


def methods_of(settings: Resolved) -> tuple[Any, ...]:
    """The methods of one stage, the lowest first."""
    return (*settings.below, settings.method)


def check_stages_of(settings: Resolved) -> None:
    """What can be told before the first stage has trained for hours.

    Raises:
        ConfigError: a stage that cannot begin, or cannot lie on those before it.
    """
    lower: list[Any] = []
    for own in stages_of(settings, Path()).values():
        check_start(own)
        for method in methods_of(own):
            check_methods(method, lower)
            lower.append(method)


def _begin(folder: RunFolder, settings: Resolved) -> None:
    write_file(folder.config, anchored(settings).to_yaml())
    head = {"lorica": __version__, "status": "running", "started": now()}
    write_file(folder.manifest, json_text({**head, "run": {"path": str(folder.path)}}))


def _train(folder: RunFolder, settings: Resolved, voice: Voice, how: dict[str, Any]) -> Outcome:
    """All stages that are not finished yet; then the whole."""
    stages = stages_of(settings, folder.path)
    outcome = Outcome(folder.path)
    try:
        for number, (path, own) in enumerate(stages.items(), 1):
            begun = (path / "run.json").is_file()
            if begun and read_manifest(path / "run.json").get("status") == "finished":
                continue
            kinds = " with ".join(method.kind for method in methods_of(own))
            voice.say(f"stage {number} of {len(stages)}: {kinds}")
            given = over_saved(path, own) if begun else own
            outcome = execute(given, resume=path if begun else None, discard=False, **how)
        _join(folder, list(stages))
    except BaseException as error:
        _fail(folder, list(stages), error)
        raise
    dress(folder.path)
    return outcome


def _fail(folder: RunFolder, stages: Sequence[Path], error: BaseException) -> None:
    """Leave a run that can be gone on with as a whole; or nothing, where none began."""
    if isinstance(error, LoricaError) and error.mend:
        for path in stages:
            error.mend = error.mend.replace(str(path), str(folder.path))
    if not (stages[0] / "run.json").exists():
        for path in (folder.manifest, folder.config):
            path.unlink()
        return
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    outcome = {"status": "interrupted"} if stopped else {"status": "failed", "error": str(error)}
    write_end(folder, outcome)


def _join(folder: RunFolder, stages: Sequence[Path]) -> None:
    """Adapter, rows, samples and run.json of the whole; run.json last, which says finished."""
    manifests = [read_manifest(path / "run.json") for path in stages]
    entries = [
        entry(path.relative_to(folder.path.absolute()), found)
        for path, found in zip(stages, manifests, strict=True)
    ]
    target = folder.adapter()
    with new_folder(target, marker=CONFIG, overwrite=True, error=AdapterFileError) as temporary:
        shutil.copytree(stages[-1] / "adapter", temporary, dirs_exist_ok=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        write_file(folder.path / name, b"".join(_lines(stages, entries, name)))
    if (stages[-1] / "samples.jsonl").is_file():
        shutil.copyfile(stages[-1] / "samples.jsonl", folder.samples)
    write_file(folder.manifest, json_text(_whole(folder, manifests, entries)))


def _lines(stages: Sequence[Path], entries: Sequence[dict], name: str) -> list[bytes]:
    """The rows of all stages, whose steps are counted on."""
    found, before = [], 0
    for number, (path, one) in enumerate(zip(stages, entries, strict=True), 1):
        for row in read_lines(path / name).values:
            step = {"step": row["step"] + before} if isinstance(row.get("step"), int) else {}
            found.append(json_line({**row, **step, "stage": number}))
        before += one["steps"]
    return found


def _whole(
    folder: RunFolder, manifests: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """run.json: that of the last stage, which answers with all of them, and sums over all."""
    last, steps = manifests[-1], sum(one["steps"] for one in entries)
    (name,) = last["adapters"]
    training, earlier = last["training"], steps - entries[-1]["steps"]
    counted = {
        "steps": {name: steps},
        "best_step": {name: earlier + training["best_step"][name]},
    }
    sums = {
        key: sum(found["resources"].get(key, 0) for found in manifests)
        for key in ("seconds", "total_seconds")
    }
    peak = max(found["resources"]["peak_memory_bytes"] for found in manifests)
    return {
        **{key: value for key, value in last.items() if key != "resumed"},
        "started": read_manifest(folder.manifest).get("started", last["started"]),
        "run": {**last["run"], "path": str(folder.path)},
        "adapters": {name: {**last["adapters"][name], "path": str(folder.adapter())}},
        "plan": {**last["plan"], "max_steps": sum(f["plan"]["max_steps"] for f in manifests)},
        "training": {**training, **counted},
        "resources": {**last["resources"], **sums, "peak_memory_bytes": peak},
        "stages": list(entries),
    }

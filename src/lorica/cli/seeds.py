"""`lorica train --seeds 0,1,2`: a whole run for each seed, and what their scores have in common.

output_dir/seed-0/  seed-1/ ...   run folders     seeds.json   median and worst of every score
output_dir/report.html            the page of the run whose first score is nearest the median
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.cli.run import execute
from lorica.cli.voice import Voice
from lorica.config import Layer, Resolved, load_yaml, resolve
from lorica.errors import ConfigError
from lorica.methods import WORDS
from lorica.records import seeds as of_seeds
from lorica.records.atomic import write_file
from lorica.records.folder import json_text
from lorica.records.lines import aligned
from lorica.records.read import read_manifest

SUMMARY = "seeds.json"


def execute_seeds(
    settings: Resolved, *, go_on: bool, discard: bool, json: bool, quiet: bool, ignore_memory: bool
) -> Path:
    """Run everything once per seed, then sum up; returns the folder.

    Args:
        go_on: go on with the runs that are there.
        discard: throw them away.
        json, quiet, ignore_memory: as for one run.

    Raises:
        ConfigError: the folder holds runs, and neither `go_on` nor `discard` says what to do.
    """
    folder = Path(settings.run.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    runs = {seed: folder / f"seed-{seed}" for seed in settings.run.seeds or ()}
    _check(folder, runs, allowed=go_on or discard)
    voice = Voice(json=json, quiet=quiet)
    for seed, path in runs.items():
        voice.say(f"seed {seed}: {path}")
        begun = go_on and (path / "run.json").is_file()
        own = _of_seed(settings, seed, path)
        execute(
            over_saved(path, own) if begun else own,
            resume=path if begun else None,
            discard=discard,
            json=json,
            quiet=quiet,
            ignore_memory=ignore_memory,
        )
    found = of_seeds.summary(
        {seed: read_manifest(path / "run.json") for seed, path in runs.items()}
    )
    from lorica.records.report import write_report  # matplotlib: not before the runs

    for path in runs.values():
        manifest = read_manifest(path / "run.json")
        write_file(path / "run.json", json_text({**manifest, "seeds": found}))
        write_report(path)
    write_file(folder / SUMMARY, json_text(found))
    write_report(runs[found["typical"]], output=folder / "report.html")
    _tell(found, runs, folder, voice, json=json)
    return folder


def _check(folder: Path, runs: dict[int, Path], *, allowed: bool) -> None:
    if (folder / "run.json").exists():
        raise ConfigError(
            f"{folder} holds a run of one seed", mend="choose another output_dir for several"
        )
    there = [path.name for path in runs.values() if (path / "run.json").exists()]
    if there and not allowed:
        raise ConfigError(
            f"{folder} already holds runs ({', '.join(there)})",
            mend=f"go on with them: add --resume {folder}; or throw them away (--replace); or "
            "choose another output_dir",
        )


def _of_seed(settings: Resolved, seed: int, path: Path) -> Resolved:
    """The settings of the run of one seed; what is held out is the same for all of them."""
    origin, seeds = settings.origins["seeds"], settings.run.seeds or (seed,)
    chosen: dict[str, Any] = {"seeds": None, "output_dir": str(path)}
    origins = {"seeds": "default", "seed": origin, "output_dir": origin}
    if settings.run.data_seed is None:
        chosen["data_seed"], origins["data_seed"] = seeds[0], origin
    return replace(
        settings,
        run=settings.run.model_copy(update=chosen),
        train=settings.train.model_copy(update={"seed": seed}),
        origins={**settings.origins, **origins},
    )


def over_saved(path: Path, settings: Resolved) -> Resolved:
    """The settings of a run that was begun, with what data and base decided, and what is given now
    over them.
    """
    given = {k: v for k, v in settings.values.items() if settings.origins[k] != "default"}
    now = Layer("settings", given, {key: settings.origins[key] for key in given})
    return resolve(load_yaml(path / "config.yaml"), now, methods=WORDS)


def _tell(
    found: dict[str, Any], runs: dict[int, Path], folder: Path, voice: Voice, *, json: bool
) -> None:
    table = of_seeds.rows(found)
    if json:
        voice.say(f"seeds: {folder / SUMMARY}")
        return
    lines = aligned(table, left=["metric"]) if table else ["no scores: there were no records"]
    print("\n".join(["", *lines, ""]))
    print(f"median   {runs[found['typical']]}")
    print(f"report   {folder / 'report.html'}")

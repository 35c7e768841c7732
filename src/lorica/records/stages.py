"""A run of several stages: what each of them added, from the entry "stages" of run.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.records.phrases import count, duration, fixed, metric_name, number, parameters


def entry(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the whole run keeps of one stage.

    Args:
        folder: of the stage, relative to that of the run.
        manifest: run.json of the stage, finished.
    """
    (own,) = manifest["adapters"].values()
    training = manifest["training"]
    return {
        "path": str(folder),
        "method": [part["kind"] for part in (*own.get("together", ()), own["method"])],
        "num_parameters": own["num_parameters"],
        "steps": _only(training["steps"]),
        "loss": _only(training["loss"]),
        "eval_loss": _only(training["eval_loss"]),
        "seconds": manifest["resources"]["seconds"],
        "scores": {
            name: {key: score[key] for key in ("base", "tuned")}
            for name, score in dict(manifest.get("scores") or {}).items()
        },
    }


def _only(by_adapter: Mapping[str, Any]) -> Any:
    (value,) = by_adapter.values()
    return value


def rows(found: object) -> list[list[str]]:
    """A table of the entries, its header first; empty without any."""
    listed = found if isinstance(found, list) else []
    entries: list[Mapping[str, Any]] = [one for one in listed if isinstance(one, Mapping)]
    if not entries:
        return []
    names = list(dict.fromkeys(name for one in entries for name in one.get("scores", {})))
    head = ["stage", "method", "steps", "parameters", "loss", "eval loss", "time"]
    table = [[*head, *map(metric_name, names)]]
    for place, one in enumerate(entries, 1):
        scores = [number(one.get("scores", {}).get(name, {}).get("tuned")) for name in names]
        losses = [number(one.get(key)) for key in ("loss", "eval_loss")]
        seconds = number(one.get("seconds"))
        table.append(
            [
                str(place),
                " with ".join(map(str, one.get("method", ()))),
                count(one.get("steps")),
                parameters(number(one.get("num_parameters"))),
                *(fixed(loss, 4) for loss in losses),
                duration(seconds) if seconds is not None else "–",
                *(fixed(score, 4) for score in scores),
            ]
        )
    return table

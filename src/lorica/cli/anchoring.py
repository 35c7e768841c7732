"""The paths among the settings of a run, made good from every directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.config import Resolved

_PATHS = (
    *("model", "data", "eval_data", "test_data", "chat_template"),
    *("init_adapter", "on_adapter"),
)
"""Settings that name a file or a folder."""


def anchored(settings: Resolved) -> Resolved:
    """The settings with the paths of files that are here made absolute: what a run folder records
    must be good from every directory.
    """
    found: dict[str, Any] = _anchored(settings.run.__dict__)
    if settings.run.adapters is not None:
        found["adapters"] = tuple({**one, **_anchored(one)} for one in settings.run.adapters)
    return replace(settings, run=settings.run.model_copy(update=found))


def _anchored(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in _PATHS:
        value: str = values.get(key) or ""
        stem = re.sub(r"#\d+$", "", value)  # records.jsonl#500: a sample of so many
        if stem not in ("", "embedded") and (path := Path(stem).expanduser()).exists():
            found[key] = str(path.absolute()) + value.removeprefix(stem)
    return found

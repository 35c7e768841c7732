"""The pictures of a run that draws: before and after, for the report.

A row of samples.jsonl names them: {"input": caption, "pictures": {"before": "samples/1-before.png",
"after": ..., "reference": ...}}. The page holds them within itself.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = ("before", "after", "reference")
_FILE = re.compile(r"samples/[0-9]{1,6}-(before|after|reference)\.png")
_MOST_BYTES = 8 << 20


def has_pictures(sample: Mapping) -> bool:
    return isinstance(sample.get("pictures"), dict)


def rows(folder: Path, samples: Sequence[Mapping]) -> list[dict[str, Any]]:
    """The caption and the three pictures of each sample, as what an <img> shows; "" for one that is
    not there.
    """
    return [
        {
            "input": str(sample.get("input") or ""),
            **{kind: _shown(folder, sample["pictures"].get(kind)) for kind in KINDS},
        }
        for sample in samples
        if has_pictures(sample)
    ]


def _shown(folder: Path, name: Any) -> str:
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        return ""
    file = folder / name
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return ""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"

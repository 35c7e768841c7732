"""The prompts on which two models are compared, as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.base.folder import read_header
from lorica.cli.opening import Subject
from lorica.data.read import read
from lorica.errors import BaseModelError
from lorica.evaluate.verify import random_prompts
from lorica.tasks import TextClassification

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    "Q: What is the capital of France?\nA:",
    "def add(a, b):\n    return",
    "In 1969 three men flew to the moon. Their names were",
)
"""Asked where no prompts are given, beside tokens drawn at random."""
LIMIT = 32
"""So many records of a file are asked at most, the first ones."""
_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def prompts_of(opened: Subject, file: str | None) -> list[list[int]]:
    """The token ids of what is asked: the records of a file, or plain texts and random tokens."""
    if file is not None:
        rows: list[Any] = [dict(row) for row in read(file).rows[:LIMIT]]
    elif isinstance(opened.task, TextClassification):
        rows = [{"text": text} for text in TEXTS]
    elif opened.format == "chat":
        rows = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    else:
        rows = [{"prompt": text} for text in TEXTS]
    asked = [ids for row in rows if (ids := _ids(opened.task, row))]
    if file is None:
        asked += map(list, random_prompts(opened.model))
    return asked


def _ids(task: Any, row: dict[str, Any]) -> list[int]:
    if isinstance(task, TextClassification):
        text = row.get("text", row.get("prompt", ""))
        return task.tokenizer(text, row.get("text_pair"))["input_ids"]
    asks = task.prompt_ids if hasattr(task, "prompt_ids") else task.encoder.prompt_ids
    return asks(row) or [task.tokenizer.eos_token_id]


def precision_of(folder: Path) -> str:
    """In what the weights of a model folder are stored: the narrowest of them, as a key of
    `LIMITS`.

    Raises:
        BaseModelError: the folder has no safetensors, or one that is damaged.
    """
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(file)
        if isinstance(header, str):
            raise BaseModelError(header)
        found |= {_NAMES.get(str(entry.get("dtype")), "float32") for entry in header.values()}
    return next((n for n in ("bfloat16", "float16", "float32") if n in found), "float32")

"""What a base may be asked for, and everything that is wrong with a request, in one error."""

from __future__ import annotations

from pathlib import Path

from lorica.base.choose import DTYPES
from lorica.base.folder import folder_problems
from lorica.base.hub import nearest_base
from lorica.base.image_pipeline import check_pipeline
from lorica.errors import BaseModelError, nearest

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""Task -> the class of transformers that loads a model for it."""

IMAGES = "text-to-image"
"""The task whose bases are pipelines of diffusers."""


def check_request(
    path: str | Path, task: str, dtype: str, labels: tuple[str, ...], trust_remote_code: bool
) -> None:
    """Raises BaseModelError with all that is wrong with these arguments of `load_model`."""
    problems = []
    if task not in (*AUTO_CLASSES, IMAGES):
        problems.append(f"unknown task {task!r}; there are {', '.join((*AUTO_CLASSES, IMAGES))}")
    elif labels and task != "text-classification":
        problems.append(f"labels belong to text-classification and have no effect on {task}")
    if len(labels) == 1 or len(set(labels)) < len(labels):
        problems.append(f"labels must be at least two different names, not {', '.join(labels)}")
    if dtype not in (*DTYPES, "auto", "as-stored"):
        near = nearest(dtype, DTYPES)
        problems.append(f"unknown dtype {dtype!r}; did you mean {near or 'auto'!r}?")
    if task == IMAGES and Path(path).is_dir():
        refuse(problems)
        check_pipeline(Path(path))
        return
    refuse(problems + path_problems(Path(path), trust_remote_code))


def path_problems(folder: Path, trust_remote_code: bool = False, weights: bool = True) -> list[str]:
    """What is wrong with the path of a base, where it is one."""
    if not str(folder).strip(". "):
        return ["the name of the base is empty"]
    try:
        there = folder.exists()
    except (OSError, ValueError) as error:
        return [f"{str(folder)[:60]!r} can be no path: {getattr(error, 'strerror', error)}"]
    if there:
        return folder_problems(folder, trust_remote_code=trust_remote_code, weights=weights)
    if not folder.is_absolute() and not str(folder).startswith("."):
        return []  # a name on the hub
    near = nearest_base(str(folder))
    return [f"there is no folder {folder}" + (f"; did you mean {near}?" if near else "")]


def refuse(problems: list[str]) -> None:
    """Raises BaseModelError where there are problems."""
    if problems:
        raise BaseModelError("the base model cannot be loaded", problems=problems)

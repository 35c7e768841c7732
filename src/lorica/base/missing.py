"""What the weight files lack of a model: only the head of a classification may begin anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch import nn

from lorica.base.known import Base
from lorica.base.labels import output_tensors, set_labels
from lorica.base.locate import located, weight_files
from lorica.base.reading import reading
from lorica.errors import BaseModelError

_HEADS = frozenset({"classifier", "score", "pre_classifier", "pooler", "classification_head"})
"""What transformers calls the modules of a classification's head."""


def missing_heads(
    name: str | Path,
    model: nn.Module,
    *,
    labels: tuple[str, ...] = (),
    revision: str = "main",
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """The modules of a classification's head for which the weight files have nothing that fits, as
    the headers of the files say: what `load_model` would start at random with these labels.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    foreign: set[str] = set()
    with reading(name, "text-classification"):
        config = transformers.AutoConfig.from_pretrained(located(name), **options)
        if labels and set_labels(config, labels).contradict:
            foreign = output_tensors(config, transformers.AutoModelForSequenceClassification)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(name, revision=revision):
        with safe_open(file, framework="pt") as stored:
            shapes |= {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return tuple(
        sorted(
            {
                _head_of(key)
                for key, tensor in model.state_dict().items()
                if _HEADS & set(key.split("."))
                and (
                    key in foreign
                    or tuple(tensor.shape)
                    not in (shapes.get(key), shapes.get(key.removeprefix(prefix)))
                )
            }
        )
    )


def new_modules(base: Base, model: nn.Module, info: dict, *, relabelled: bool) -> tuple[str, ...]:
    """Modules without weights in the files. Only the head of a classification may be new, and
    replace that of the files only where other classes are wanted.
    """
    replaced = {str(key[0]) for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) | replaced)

    def may_be_new(key: str) -> bool:
        is_head = base.task == "text-classification" and bool(_HEADS & set(key.split(".")))
        return is_head and (relabelled or key not in replaced)

    wrong = [
        f"{key} (of another shape)" if key in replaced else key
        for key in missing
        if not may_be_new(key)
    ]
    if wrong:
        raise BaseModelError(
            f"the weights of {base.name} do not fill a {type(model).__name__}: {len(wrong)} "
            "tensors are missing",
            problems=wrong[:10],
            mend="choose the task that the model was made for",
        )
    if unused := sorted(info["unexpected_keys"]):
        shown = ", ".join(unused[:3]) + (" ..." if unused[3:] else "")
        base.notes.append(
            f"{len(unused)} tensors of the files are not used for {base.task}: {shown}"
        )
    parts = sorted({_head_of(key) for key in missing})
    if parts:
        base.notes.append(f"new, started at random, to be trained whole: {', '.join(parts)}")
    return tuple(parts)


def _head_of(key: str) -> str:
    """The path down to the module of the head that a tensor belongs to."""
    words = key.split(".")
    return ".".join(words[: next(i for i, word in enumerate(words) if word in _HEADS) + 1])

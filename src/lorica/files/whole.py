"""A whole model as a folder that plain transformers loads, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from lorica.attach.handle import adapters
from lorica.errors import BaseModelError
from lorica.files.folder import new_folder
from lorica.records.atomic import write_file

WEIGHTS, FACTS = "model.safetensors", "lorica.json"


def save_merged(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, after `merge`, in the format of its library; the base on the disk is not
    touched.

    Args:
        model: without adapters. A model of transformers is written by its `save_pretrained`; any
            other module as one file of its parameters and buffers.
        folder: appears whole or not at all; it may not be the folder of the base.
        tokenizer: written into the same folder, with its chat template.
        facts: how the model must be asked, for lorica.json: {"task": task.facts()}.
        overwrite: replace a model that is there.

    Raises:
        BaseModelError: adapters are attached (they would be lost), or the folder exists.
    """
    if left := adapters(model):
        raise BaseModelError(
            f"adapters are attached ({', '.join(left)}); a saved model would be the bare base",
            mend="merge them first, or detach them",
        )
    loaded_from = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or "-"))
    if Path(folder).exists() and loaded_from.exists() and loaded_from.samefile(folder):
        raise BaseModelError(f"{folder} is the folder of the base", mend="choose another name")
    save = getattr(model, "save_pretrained", None)
    marker = "config.json" if save is not None else WEIGHTS
    with new_folder(folder, marker=marker, overwrite=overwrite, error=BaseModelError) as temporary:
        if save is not None:
            save(temporary)
        else:
            save_model(model, str(temporary / WEIGHTS), metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if facts is not None:
            write_file(temporary / FACTS, json.dumps(dict(facts), indent=2, sort_keys=True) + "\n")
    return Path(folder)

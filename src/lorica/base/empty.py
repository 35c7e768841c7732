"""The model of a base as its config describes it, without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorica.base.hub import hub_options
from lorica.base.image_pipeline import check_pipeline, empty_pipeline
from lorica.base.labels import set_labels
from lorica.base.locate import located
from lorica.base.reading import reading
from lorica.base.request import AUTO_CLASSES, IMAGES, path_problems, refuse
from lorica.errors import BaseModelError


def empty_model(
    name: str | Path,
    *,
    task: str = "causal-lm",
    revision: str = "main",
    trust_remote_code: bool = False,
    labels: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    change: Callable[[Any], None] | None = None,
    device: str = "meta",
) -> nn.Module:
    """The model as its config describes it, without weights: for counting and naming, on the meta
    device.

    Args:
        labels: classes of a classification; empty: those of the config.
        dtype: of the parameters; None: as the config says.
        change: is handed the config before the model is made of it.
        device: "meta", or one where the parameters shall be: with random values.

    Raises:
        BaseModelError: there is no config, or none for this task.
    """
    path = located(name)
    if task == IMAGES:
        check_pipeline(Path(path))
        with reading(name, task):
            return empty_pipeline(Path(path))
    if task not in AUTO_CLASSES:
        raise BaseModelError(
            f"unknown task {task!r}", expected=f"one of: {', '.join((*AUTO_CLASSES, IMAGES))}"
        )
    refuse(path_problems(Path(path), trust_remote_code, weights=False))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    local = hub_options(path, revision)
    with reading(name, task):
        config = transformers.AutoConfig.from_pretrained(
            path, revision=revision, **options, **local
        )
        if labels:
            set_labels(config, labels)
        if change is not None:
            change(config)
        if dtype is not None:
            options["dtype"] = dtype
        with torch.device(device):
            return getattr(transformers, AUTO_CLASSES[task]).from_config(config, **options)

"""Pictures from prompts, each from noise of its own seed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from lorica.base.image_pipeline import ImagePipeline
from lorica.errors import ConfigError
from lorica.tasks.task import answering


def draw(
    model: ImagePipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 30,
    guidance_scale: float | None = None,
    resolution: int | None = None,
) -> list[Any]:
    """One picture (PIL) per prompt, by the model as it is activated.

    With one mixture per row, `activate` takes one entry per picture: both passes of a picture
    through the denoiser, without and with the prompt, run under its entry.

    Args:
        seeds: of the noise that each picture begins with; it does not depend on the others.
        guidance_scale: how far to go from the answer without the prompt to that with it and beyond;
            None: the pipeline's own.
        resolution: pixels of a side; None: the pipeline's own.

    Raises:
        ConfigError: as many seeds as prompts are needed; or the pipeline takes no guidance.
    """
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts with {len(seeds)} seeds", expected="as many")
    known = inspect.signature(type(model.pipe).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    if guidance_scale is not None:
        given["guidance_scale"] = guidance_scale
    if resolution is not None:
        given |= {"height": resolution, "width": resolution}
    if ignored := [name for name in given if name not in known]:
        kind = type(model.pipe).__name__
        raise ConfigError(f"a {kind} does not take {', '.join(ignored)}", mend="leave it out")
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    with answering(model):
        return model.pipe(prompt=list(prompts), generator=noise, **given).images

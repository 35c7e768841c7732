"""A diffusers pipeline as one module, so that an adapter can sit on several of its parts.

Paths are those that diffusers has in its files: unet.down_blocks.0..., text_encoder.text_model...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lorica.errors import BaseModelError, MissingPackage

PARTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
"""What of a pipeline adapters are kept for, by diffusers' names. An image decoder is none of it."""
MARKER = "model_index.json"


class Parts(nn.Module):
    """The parts of a pipeline that adapters can sit on; the very modules that it runs.

    It has no forward of its own: the pipeline calls its parts.

    Args:
        pipeline: of diffusers; or a table of modules under names of `PARTS`.

    Raises:
        BaseModelError: there is no such part in it.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        held = pipeline if isinstance(pipeline, dict) else pipeline.components
        for name in PARTS:
            if isinstance(held.get(name), nn.Module):
                self.add_module(name, held[name])
        if not self._modules:
            raise BaseModelError(
                f"{type(pipeline).__name__} has no part that adapters are kept for",
                expected=f"one of {', '.join(PARTS)}",
            )


def load_parts(folder: str | Path) -> Parts:
    """The parts of a pipeline's folder, on the CPU.

    Raises:
        BaseModelError: it cannot be loaded, or has no parts.
        MissingPackage: diffusers is not installed.
    """
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except ImportError as error:
        raise MissingPackage.of("diffusers", "images", "a text-to-image pipeline") from error
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise BaseModelError(
            f"{folder} is no pipeline that diffusers can load: {str(error)[:300]}",
            expected=f"a folder with {MARKER} and safetensors",
        ) from error
    return Parts(pipeline)

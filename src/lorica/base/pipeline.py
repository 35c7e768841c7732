"""A diffusers pipeline as one module, so that an adapter can sit on several of its parts.

Paths are those that diffusers has in its files: unet.down_blocks.0..., text_encoder.text_model...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
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
    """The parts of a pipeline's folder, on the CPU; nothing else of it is loaded.

    Raises:
        BaseModelError: it cannot be loaded, or has no parts.
        MissingPackage: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackage.of("diffusers", "images", "a text-to-image pipeline") from error
    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    found: dict[str, nn.Module] = {}
    try:
        index = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
        for name in PARTS:
            library, kind = index.get(name) or (None, None)
            if library is None:
                continue
            made = getattr(libraries.get(str(library)), str(kind), None)
            if made is None:
                raise ValueError(f"{name} is {library}.{kind}, which is in neither library")
            found[name] = made.from_pretrained(
                str(Path(folder) / name), use_safetensors=True, local_files_only=True
            ).eval()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{folder} is no pipeline that can be loaded: {str(error)[:300]}",
            expected=f"a folder with {MARKER}, and safetensors in those of its parts",
        ) from error
    return Parts(found)

"""A text-to-image pipeline of diffusers as one module, read strictly and without anybody's code.

A pipeline is a folder of folders: `model_index.json` says which class of which library makes each
part, and every network has a folder with a config and safetensors. As a module its parts bear the
names that they have there (`unet` or `transformer`, `text_encoder`, `vae` ...), so that a place of
an adapter has the path that diffusers' own LoRA files give it.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.base.folder import read_header
from lorica.errors import BaseModelError, MissingPackage

INDEX_FILE = "model_index.json"
DENOISERS = ("unet", "transformer")
"""What diffusers calls the network that takes noise away, whose rows guidance doubles."""
LIBRARIES = frozenset({"diffusers", "transformers"})
MOST_BYTES = 1 << 20


class ImagePipeline(nn.Module):
    """A diffusers pipeline whose networks are submodules under diffusers' names.

    `pipeline.pipe(prompt)` draws; calling the module runs its denoiser.

    Attributes:
        pipe: the pipeline of diffusers, with the very same networks.
        denoiser_name: "unet" or "transformer".
    """

    supports_gradient_checkpointing = True  # as transformers names it: the engine asks for it

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe = pipe
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        found = [name for name in DENOISERS if name in self._modules]
        if len(found) != 1:
            raise BaseModelError(
                f"{type(pipe).__name__} has {' and '.join(found) or 'no denoiser'}",
                expected="one network that takes noise away: unet or transformer",
            )
        self.denoiser_name = found[0]

    @property
    def denoiser(self) -> nn.Module:
        return self._modules[self.denoiser_name]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def resolution(self) -> int:
        """Pixels of a side that the denoiser was made for."""
        config: Any = self.denoiser.config
        return int(config.sample_size) * self.latent_scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(*args, **kwargs)

    def activation_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        """Recompute the denoiser's activations in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def activation_checkpointing_disable(self) -> None:
        self.denoiser.disable_gradient_checkpointing()  # type: ignore[operator]

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, channels, h, w) of the latents of pictures from -1 to 1
        (n, 3 or 1, H, W), shifted and scaled as the denoiser knows them.
        """
        vae: Any = self.vae
        found = vae.encode(pixels.to(next(vae.parameters()).dtype)).latent_dist
        shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        return (found.mean.float() - shift) * scale, found.std.float() * scale


def is_pipeline(name: str | Path) -> bool:
    """Whether a folder is a pipeline of diffusers."""
    return (Path(name).expanduser() / INDEX_FILE).is_file()


def pipeline_files(folder: Path) -> list[Path]:
    """The weight files of all parts, in the order of their paths."""
    return sorted(folder.glob("*/*.safetensors"))


def read_pipeline(path: str | Path, dtype: torch.dtype, options: dict[str, Any]) -> ImagePipeline:
    """Read all parts of a pipeline, from safetensors alone.

    Args:
        path: a folder that `pipeline_problems` finds no fault with, or a hub id.
        options: for diffusers' `from_pretrained`: revision, local_files_only.

    Raises:
        MissingPackage: diffusers is not installed.
        BaseModelError: it has no denoiser, or several.
    """
    with _quiet():
        diffusers: Any = import_diffusers()
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            path, torch_dtype=dtype, use_safetensors=True, **_absent(Path(path)), **options
        )
    pipe.set_progress_bar_config(disable=True)
    return ImagePipeline(pipe)


def _absent(folder: Path) -> dict[str, None]:
    """The parts that a folder says it does not have: diffusers wants to be told so once more."""
    if not is_pipeline(folder):
        return {}
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    return {name: None for name, value in index.items() if value == [None, None]}


def empty_pipeline(folder: Path) -> ImagePipeline:
    """The pipeline as its configs describe it, on the meta device; for counting and naming."""
    with _quiet():
        import_diffusers()
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        parts: dict[str, Any] = {}
        for name, (library, kind) in _parts(index).items():
            if not (folder / name / "config.json").is_file():
                continue  # a scheduler, a tokenizer: nothing that holds weights
            made = getattr(importlib.import_module(library), kind)
            with torch.device("meta"):
                parts[name] = _from_config(made, folder / name)
    return ImagePipeline(_Parts(parts))


def _from_config(made: Any, folder: Path) -> nn.Module:
    if hasattr(made, "load_config"):  # of diffusers
        return made.from_config(made.load_config(folder))
    return made(made.config_class.from_pretrained(folder))


class _Parts:
    """The networks of a pipeline without what draws with them."""

    def __init__(self, components: dict[str, nn.Module]) -> None:
        self.components = components


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of libraries that diffusers looks for on its way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_diffusers() -> Any:
    """The package diffusers. Raises MissingPackage with the install command."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackage.of("diffusers", "images", "text to image") from error
    logging: Any = diffusers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return diffusers


def pipeline_problems(folder: Path) -> list[str]:
    """Everything that keeps a folder from being a pipeline that is read, a sentence each."""
    file = folder / INDEX_FILE
    if not file.is_file():
        beside = "; it is a transformers model" if (folder / "config.json").is_file() else ""
        return [f"{folder} has no {INDEX_FILE}, as a pipeline of diffusers has{beside}"]
    if file.stat().st_size > MOST_BYTES:
        return [f"{file} has {file.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read"]
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{file} is no JSON: {str(error)[:200]}"]
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        return [f"{file} names no pipeline: _class_name is missing"]
    problems = [
        f"{file}: {key} is made by {value[0]}.{value[1]}: Python code that comes with a pipeline "
        "is not run"
        for key, value in _named(index).items()
        if value[0] not in LIBRARIES
    ]
    if not any(name in _parts(index) for name in DENOISERS):
        problems.append(f"{file} names no {' and no '.join(DENOISERS)}")
    for name in _parts(index):
        problems += _part_problems(folder / name)
    return problems


def _named(index: dict[str, Any]) -> dict[str, list[str]]:
    """The parts that are there: name -> library and class."""
    return {
        key: value
        for key, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)
    }


def _parts(index: dict[str, Any]) -> dict[str, list[str]]:
    """Likewise, of the libraries whose code is run; names that lead elsewhere are none."""
    return {
        key: value
        for key, value in _named(index).items()
        if value[0] in LIBRARIES and key.isidentifier()
    }


def _part_problems(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"there is no folder {folder}, which {INDEX_FILE} names"
        return
    files = sorted(folder.glob("*.safetensors"))
    pickled = [p.name for kind in ("*.bin", "*.pt", "*.ckpt") for p in folder.glob(kind)]
    if pickled and not files:
        yield (
            f"{folder} has no *.safetensors; its pickled weights ({', '.join(sorted(pickled)[:3])})"
            " are never loaded: convert them first, where you trust them"
        )
    elif (folder / "config.json").is_file() and not files:
        yield f"{folder} has a config.json and no *.safetensors"
    for file in files:
        if isinstance(header := read_header(file), str):
            yield header


def check_pipeline(folder: Path) -> None:
    """Raises BaseModelError for everything that `pipeline_problems` finds."""
    if problems := pipeline_problems(folder):
        raise BaseModelError(
            "the pipeline cannot be loaded",
            problems=problems,
            expected="a folder as diffusers' save_pretrained writes it, with safetensors",
        )


def guided_paths(model: nn.Module) -> tuple[str, ...]:
    """The paths of denoisers in `model`: there a pipeline that guides gives every row twice."""
    kinds = ("diffusers.models.unets", "diffusers.models.transformers")
    found: list[str] = []
    for path, module in model.named_modules():
        own = type(module)
        whole = any(base.__name__ == "ModelMixin" for base in own.__mro__)  # no block of another
        if whole and own.__module__.startswith(kinds) and not _inside(path, found):
            found.append(path)
    return tuple(found)


def _inside(path: str, found: list[str]) -> bool:
    return any(not one or path.startswith(f"{one}.") for one in found)

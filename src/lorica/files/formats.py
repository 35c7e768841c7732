"""The formats of other tools, one line each: how an adapter is written there, and read from there.

A format is one file of this folder. What `load_adapter` is given is recognised by what it holds,
never by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lorica.attach.handle import Adapter
from lorica.errors import AdapterFileError
from lorica.files import adapterhub, diffusers_lora, gguf_lora, kohya, mlx, vllm
from lorica.files.found import Found
from lorica.files.safetensors_file import TensorFile

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class Format:
    """How one tool keeps an adapter.

    Attributes:
        title: the line that `lorica export --help` and docs/formats.md show.
        suffix: of its file; empty where it is a folder.
        write: (adapter, path, dtype, overwrite) -> what the user should be told. Raises
            AdapterFileError with every reason for which the format cannot hold the adapter.
        claims: whether a file or folder is of this format, by what it holds.
        read: onto a model, as `attach_tensors` needs it; None where the tool's files are written
            only.
        dtypes: in which its numbers may be written, the default first.
    """

    title: str
    suffix: str
    write: Callable[[Adapter, Path, str, bool], list[str]]
    claims: Callable[[Path], bool]
    read: Callable[[nn.Module, Path], Found] | None
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


FORMATS: dict[str, Format] = {
    "gguf": Format(
        "LoRA of llama.cpp, loaded beside a GGUF base",
        ".gguf",
        gguf_lora.write,
        gguf_lora.claims,
        gguf_lora.read,
        ("float32", "float16"),
    ),
    "kohya": Format(
        "kohya and LyCORIS, for text-to-image tools (LoRA, DoRA, LoHa, LoKr)",
        ".safetensors",
        kohya.write,
        kohya.claims,
        kohya.read,
    ),
    "diffusers": Format(
        "a file of diffusers, for load_lora_weights",
        "",
        diffusers_lora.write,
        diffusers_lora.claims,
        diffusers_lora.read,
    ),
    "mlx": Format("a folder of mlx-lm", "", mlx.write, mlx.claims, mlx.read),
    "adapterhub": Format(
        "a folder of AdapterHub (LoRA, bottlenecks; encoders with BERT's names)",
        "",
        adapterhub.write,
        adapterhub.claims,
        adapterhub.read,
    ),
    "vllm": Format(
        "a folder that vLLM serves, one rank and scale everywhere",
        "",
        vllm.write,
        vllm.claims,
        None,
    ),
}


def recognised(path: Path) -> Format | None:
    """The foreign format of a file or folder; None for what is none of them.

    Raises:
        AdapterFileError: a pickle, which is never loaded.
    """
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise AdapterFileError(
            f"{path} is a pickle, which can run code when read; none is loaded",
            expected="a .safetensors or .gguf file, or a folder with one",
            mend="convert it where you trust it: torch.load(file, weights_only=True), then "
            "safetensors.torch.save_file(tensors, 'adapter.safetensors')",
        )
    return next(
        (form for form in FORMATS.values() if form.read is not None and form.claims(path)), None
    )


def some_keys(path: Path) -> list[str]:
    """The first names in a safetensors file, to say what it holds; none of another file."""
    if path.suffix != ".safetensors":
        return []
    with TensorFile(path) as file:
        return [*file.entries][:3]

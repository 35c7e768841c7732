"""Everything that can be written: adapters in all formats, and models that one was merged into.

The first lines of `ADAPTERS` are folders of Lorica, which PEFT reads wherever it has the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.handle import Adapter
from lorica.errors import AdapterFileError
from lorica.files import gguf_model, ollama, onnx_model, peft, peft_kinds, peft_prompts
from lorica.files.adapter import save_adapter
from lorica.files.formats import FORMATS


@dataclass(frozen=True)
class Export:
    """One format to write in.

    Attributes:
        title: the line that help and docs/formats.md show.
        suffix: of its file; empty where it is a folder.
        dtypes: in which numbers may be written, the default first.
    """

    title: str
    suffix: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class ModelExport(Export):
    """One format of whole models: `write(model, tokenizer, path, dtype, overwrite)` gives notes."""

    write: Callable[[nn.Module, Any, Path, str, bool], list[str]]


ADAPTERS: dict[str, Export] = {
    "peft": Export("a folder of PEFT, for every tool that reads those", "", ("float32",)),
    "lorica": Export("a folder of Lorica, for methods that PEFT lacks as well", "", ("float32",)),
    **{name: Export(one.title, one.suffix, one.dtypes) for name, one in FORMATS.items()},
}

MODELS: dict[str, ModelExport] = {
    "gguf-model": ModelExport(
        "the merged model for llama.cpp, with its tokenizer",
        ".gguf",
        tuple(gguf_model.DTYPES),
        gguf_model.write,
    ),
    "ollama": ModelExport(
        "the same with a Modelfile, for ollama create",
        "",
        tuple(gguf_model.DTYPES),
        ollama.write,
    ),
    "onnx": ModelExport(
        "the merged model for onnxruntime, which must agree with it",
        "",
        ("float32",),
        onnx_model.write,
    ),
}


def write_adapter(
    adapter: Adapter,
    name: str,
    path: Path,
    dtype: str,
    *,
    overwrite: bool = False,
    tokenizer: Any = None,
) -> list[str]:
    """Write an adapter in a format of `ADAPTERS`; returns what the user should be told.

    Raises:
        AdapterFileError: the format cannot hold the adapter, with every reason; or something is
            there already. Nothing is written then.
    """
    if name in FORMATS:
        return FORMATS[name].write(adapter, path, dtype, overwrite)
    of_peft = (peft, peft_kinds, peft_prompts)
    if name == "peft" and (adapter.on is not None or not any(one.fits(adapter) for one in of_peft)):
        below = " on top of another adapter" if adapter.on is not None else ""
        raise AdapterFileError(
            f"PEFT has no {adapter.method.kind}{below} as it sits here",
            mend="write it with --format lorica, or merge it into its base (lorica merge)",
        )
    save_adapter(adapter, path, provenance=adapter.noted, tokenizer=tokenizer, overwrite=overwrite)
    return []

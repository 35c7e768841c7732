"""A folder for `ollama create`: the merged model as GGUF, and the Modelfile that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lorica.errors import AdapterFileError
from lorica.files import gguf_model
from lorica.files.folder import new_folder
from lorica.records.atomic import write_file

MODELFILE, WEIGHTS = "Modelfile", "model.gguf"


def write(
    model: nn.Module, tokenizer: Any, path: Path, dtype: str, overwrite: bool = False
) -> list[str]:
    """Write the folder; returns what the user should be told.

    Texts end with the tokenizer's end token. The chat template travels inside the GGUF file, where
    Ollama recognises those of the well-known models; another one it needs as TEMPLATE in its own
    language, which is not made here.

    Raises:
        AdapterFileError: as `gguf_model.write`.
    """
    lines = [f"FROM ./{WEIGHTS}"]
    if (end := getattr(tokenizer, "eos_token", None)) is not None:
        lines.append(f'PARAMETER stop "{_quoted(end)}"')
    with new_folder(
        path, marker=MODELFILE, overwrite=overwrite, error=AdapterFileError
    ) as temporary:
        notes = gguf_model.write(model, tokenizer, temporary / WEIGHTS, dtype)
        write_file(temporary / MODELFILE, "\n".join(lines) + "\n")
    if getattr(tokenizer, "chat_template", None):
        notes.append(
            "Ollama knows the chat templates of well-known models only; `ollama show --modelfile` "
            "says what it took; write TEMPLATE where it is another one"
        )
    return [*notes, f"ollama create NAME -f {path / MODELFILE}"]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')

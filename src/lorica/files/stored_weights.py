"""The weights of a base in its files, read one at a time by the names that the model gives them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import AdapterFileError
from lorica.files.safetensors_file import TensorFile


class StoredWeights:
    """The open weight files of a base. A file of the bare stack of layers has names without the
    prefix that it has in a model with a head; they are found all the same.

    Attributes:
        files: in order, each with its tensors: key -> name in the model.

    Args:
        model: the base, with or without its weights, whose names count.
        files: its *.safetensors.

    Raises:
        AdapterFileError: a file is damaged, or holds packed numbers.
    """

    def __init__(self, model: nn.Module, files: list[Path]) -> None:
        known, prefix = set(model.state_dict()), _prefix(model)
        self._opened: list[TensorFile] = []
        self.files: dict[Path, dict[str, str]] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        try:
            for file in files:
                opened = TensorFile(file)
                self._opened.append(opened)
                names = {
                    key: f"{prefix}{key}" if key not in known and f"{prefix}{key}" in known else key
                    for key in opened.entries
                }
                self.files[file] = names
                self._places |= {name: (opened, key) for key, name in names.items()}
        except AdapterFileError:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Any:
        return iter(self._places)

    def read(self, name: str) -> Tensor:
        """One tensor, in a memory of its own."""
        file, key = self._places[name]
        return file.read(key)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Its type and shape, without reading it."""
        file, key = self._places[name]
        entry = file.entries[key]
        return entry.dtype, entry.shape

    def close(self) -> None:
        """Close all files."""
        for file in self._opened:
            file.close()

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _prefix(model: Any) -> str:
    return f"{getattr(model, 'base_model_prefix', '') or '-'}."

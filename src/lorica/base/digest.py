"""Digests that stand for the numbers of a base: of its weight files, or of its tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from lorica.base.known import base_of


def digest_of(model: nn.Module) -> str:
    """SHA-256 that stands for the very numbers of a base: of its files where they hold them as they
    are, else of its tensors. (That of a quantized base's packed weights is the same in every dtype,
    and leaves out the numbers of what is not packed.)
    """
    base = base_of(model)
    exact = base is not None and base.digest and base.quantize is None
    return base.digest if exact and base else digest_of_tensors(model)


def digest_of_files(folder: Path) -> str:
    """SHA-256 over the weight files of a folder, in the order of their names."""
    return digest_of_bytes(sorted(folder.glob("*.safetensors")))


def digest_of_bytes(files: list[Path]) -> str:
    """SHA-256 over the files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def digest_of_tensors(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers that a model saves."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(key.encode())
        digest.update(raw.numpy())
    return digest.hexdigest()

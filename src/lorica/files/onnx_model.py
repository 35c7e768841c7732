"""A merged language model as ONNX: ids in, logits out, any batch and length."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import AdapterFileError, MissingPackage
from lorica.files.folder import new_folder
from lorica.records.atomic import write_file

WEIGHTS = "model.onnx"
TOLERANCE = 1e-3
"""Largest difference of logits, by the spread of the model's own, that a written file may have."""


class _Logits(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def write(
    model: nn.Module, tokenizer: Any, path: Path, dtype: str, overwrite: bool = False
) -> list[str]:
    """Write the folder; returns what the user should be told.

    The file is run once by onnxruntime, at another batch and length than it was made with, and must
    agree with the model.

    Raises:
        AdapterFileError: torch cannot export the model, or the file answers otherwise.
        MissingPackage: onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx imports it without saying so)
    except ImportError as error:
        raise MissingPackage.of("onnxruntime", "onnx", "ONNX") from error
    wrapped = _Logits(model.float().eval())
    ids = _ids(model, 2, 7)
    dynamic = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}
    with new_folder(path, marker=WEIGHTS, overwrite=overwrite, error=AdapterFileError) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own insides
            try:
                torch.onnx.export(
                    wrapped,
                    (ids, torch.ones_like(ids)),
                    str(temporary / WEIGHTS),
                    input_names=["input_ids", "attention_mask"],
                    output_names=["logits"],
                    dynamic_shapes=dynamic,
                    dynamo=True,
                    verbose=False,
                )
            except Exception as error:  # torch raises its own kinds, which are not exported
                raise AdapterFileError(
                    f"torch cannot export this {type(model).__name__} as ONNX: {str(error)[:300]}"
                ) from error
        session = onnxruntime.InferenceSession(
            str(temporary / WEIGHTS), providers=["CPUExecutionProvider"]
        )
        difference = _difference(session, wrapped, _ids(model, 3, 11))
        if not difference < TOLERANCE:
            raise AdapterFileError(
                f"onnxruntime answers otherwise: logits differ by {difference:.1e} of their spread",
                expected=f"less than {TOLERANCE:.0e}",
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if (config := getattr(model, "config", None)) is not None:
            write_file(temporary / "config.json", config.to_json_string())
    return [f"onnxruntime agrees: logits differ by {difference:.1e} of their spread at most"]


def _ids(model: nn.Module, rows: int, length: int) -> Tensor:
    config: Any = model.config
    size = config.get_text_config().vocab_size
    return torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(rows))


def _difference(session: Any, model: nn.Module, ids: Tensor) -> float:
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids, mask)
    fed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    found = torch.from_numpy(session.run(["logits"], fed)[0])
    return float((found - expected).abs().max() / expected.std())

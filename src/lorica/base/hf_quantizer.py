"""Lorica's quantizers at the door that transformers has for such: while it loads a model.

transformers hands every tensor over by itself, in the names that the model knows, one after the
other; so no more than one of them lies in memory in full. Nothing of the door is left behind: the
model is a plain model of transformers, some of whose layers have packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorica.base.quantize import check, quantizable
from lorica.base.quantized import quantized
from lorica.base.quantizer import Quantizer, Stored
from lorica.errors import BaseModelError, folded

_WORD = "lorica"
_EXACT = "_keep_in_fp32_modules_strict"
"""Where a model of transformers names the weights that are handed over in float32."""


class OnTheWay(QuantizationConfigMixin):
    """What is to be done while a model is loaded: quantize its layers, or leave a place for layers
    that were quantized before.

    Args:
        quantizer: for all layers that it takes.
        head: for the output head too.
        stored: layers by path that are read later; then `quantizer` is None.
    """

    def __init__(
        self,
        quantizer: Quantizer | None = None,
        *,
        head: bool = False,
        stored: Mapping[str, Quantizer] | None = None,
    ) -> None:
        self.quant_method: Any = _WORD
        self.quantizer, self.head, self.stored = quantizer, head, dict(stored or {})
        self.broken: list[str] = []

    def finish(self) -> None:
        """Raises BaseModelError where weights could not be quantized."""
        if self.broken:
            raise BaseModelError(
                "weights that are NaN or infinite cannot be quantized",
                problems=folded((path, "holds such numbers") for path in self.broken)[:20],
            )


class AtTheDoor(HfQuantizer):
    """Called by transformers, once for a model."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.request: OnTheWay = quantization_config
        self.layers: dict[str, nn.Linear] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.exact: Any = None
        self.packed: dict[str, tuple[Stored, torch.dtype]] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """The skeleton is there, and no weight yet."""
        if (kind := self.request.quantizer) is not None:
            self.layers = quantizable(model, head=self.request.head)
            check(kind, self.layers, type(model).__name__)
            self.dtypes = {path: module.weight.dtype for path, module in self.layers.items()}
            self.exact = getattr(model, _EXACT, None)
            # What is stored shall not depend on the dtype that is computed with, which differs from
            # machine to machine: so the weights come in float32, as exact as the files have them.
            setattr(model, _EXACT, {*(self.exact or ()), *(f"{p}.weight" for p in self.layers)})
        for path in self.request.stored:
            module = _submodule(model, path)
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            _known(module)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.layers

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, (stored, dtype) in self.packed.items():  # transformers empties buffers before
            kind = self.request.quantizer
            assert kind is not None
            quantized(self.layers[path], kind, stored, dtype)
        if self.request.quantizer is not None:
            setattr(model, _EXACT, self.exact)
        self.remove_quantization_config(model)
        for module in model.modules():
            own: Any = getattr(module, "config", self)
            vars(own).pop("_is_quantized", None)
        model.__dict__.pop("is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Pack(ConversionOps):
    """One weight in full, to one that is packed."""

    def __init__(self, door: AtTheDoor) -> None:
        self.door = door

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Tensor]:
        result, kind = {}, self.door.request.quantizer
        assert kind is not None
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            if not weight.isfinite().all():
                self.door.request.broken.append(path)
                weight = torch.zeros_like(weight)
            stored = kind.pack(weight)
            self.door.packed[path] = stored, self.door.dtypes[path]
            _known(self.door.layers[path])
            result[name] = nn.Parameter(stored["weight"], requires_grad=False)
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        raise BaseModelError(
            "transformers does not write a base that Lorica has quantized",
            mend="write it with lorica.files.quantized.save_base(model, FOLDER)",
        )


def _known(module: nn.Module) -> None:
    """Tell transformers not to start the weight at random."""
    module.__dict__["_is_hf_initialized"] = True


def _submodule(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise BaseModelError(
            f"the files hold a quantized weight for {path}, where {type(model).__name__} has no "
            "linear layer",
            mend="choose the task that the model was made for",
        )
    return module


# By calls, for as decorators they hide the classes' own attributes from a type checker.
register_quantization_config(_WORD)(OnTheWay)
register_quantizer(_WORD)(AtTheDoor)

"""What a merge replaced, and how it is put back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.attach import put_back
from lorica.attach.handle import Adapter, attached_to
from lorica.base.foreign import check_foreign
from lorica.base.quantize import quantized_layers
from lorica.base.quantized import QuantizedLinear, quantized
from lorica.base.quantizer import Quantizer, Stored
from lorica.base.storage import is_packed, write_weight
from lorica.errors import MergeError


@dataclass(frozen=True, eq=False)
class PackedBefore:
    """A quantized layer as it was."""

    module: QuantizedLinear
    quantizer: Quantizer
    stored: Stored
    dtype: torch.dtype

    def put_back(self) -> None:
        quantized(self.module, self.quantizer, self.stored, self.dtype)


@dataclass(eq=False)
class Undo:
    """The state of a model before a merge.

    Attributes:
        model: as it was merged into.
        taken_off: its adapters that went with the merge, in the order in which they had come.
        replaced: module, name of the parameter, its values before, and the parameter's version when
            the merge had written it.
        packed: layers that were quantized.
        ties: module, name and the shared parameter that was there.
        configs: parts of the config and whether they said that ends are tied.
        tied_keys: the table of tied weights that the model kept.
        base: what was known of the base.
    """

    model: nn.Module
    taken_off: list[Adapter] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str, Tensor, int]] = field(default_factory=list)
    packed: list[PackedBefore] = field(default_factory=list)
    ties: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    configs: list[tuple[Any, bool]] = field(default_factory=list)
    tied_keys: dict[str, str] = field(default_factory=dict)
    base: Any = None
    done: bool = False

    def run(self) -> None:
        """Put everything back. Raises MergeError where that is no longer possible."""
        if self.done:
            raise MergeError("this merge was undone already")
        self._check()
        for module, name, values, _ in self.replaced:
            _parameter(module, name).data.copy_(values)
        for layer in self.packed:
            layer.put_back()
        for module, name, parameter in self.ties:
            parameter.requires_grad_(_parameter(module, name).requires_grad)
            module._parameters[name] = parameter
        for config, was_tied in self.configs:
            config.tie_word_embeddings = was_tied
        if self.tied_keys:
            getattr(self.model, "all_tied_weights_keys").update(self.tied_keys)  # noqa: B009
        if self.base is not None:
            self.model.__dict__["_lorica_base"] = self.base
        for adapter in self.taken_off:
            put_back(adapter)
        self.done = True
        self.replaced.clear()
        self.packed.clear()

    def _check(self) -> None:
        changed = [
            name
            for module, name, _, version in self.replaced
            if _parameter(module, name)._version != version
        ]
        if changed:
            raise MergeError(
                f"{len(changed)} merged weights were written since, by another merge or by "
                "training; undoing this one would lose that",
                mend="undo the later merge first, or load the base again",
            )
        here = attached_to(self.model).adapters
        if self.packed and here:
            raise MergeError(
                f"adapters sit on layers that would be quantized again: {', '.join(here)}",
                mend="detach them first",
            )
        if self.taken_off:
            check_foreign(self.model)
        if taken := [a.name for a in self.taken_off if a.name in here]:
            raise MergeError(
                f"adapters of the names {', '.join(taken)} were attached since",
                mend="detach them first",
            )


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    found = module._parameters[name]
    assert found is not None
    return found


def keep_ties(undo: Undo, model: nn.Module, paths: list[str]) -> None:
    """Remember the shared parameters that `untie` will part, and who says that they are shared."""
    keys = getattr(model, "all_tied_weights_keys", None)
    for path in [*paths, *(keys or ())]:
        core, _, name = path.rpartition(".")
        module = model.get_submodule(core)
        undo.ties.append((module, name, _parameter(module, name)))
    config: Any = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        undo.configs.append((part, part.tie_word_embeddings))
    undo.tied_keys = dict(keys) if isinstance(keys, dict) else {}


def keep_packed(undo: Undo, model: nn.Module) -> None:
    """Remember the storage of every quantized layer. Nothing is copied: a merge gives such a layer
    new tensors.
    """
    undo.packed += [
        PackedBefore(module, module.quantizer, module.stored(), module.stored_dtype)
        for _, module in quantized_layers(model)
    ]


def write(
    undo: Undo | None, module: nn.Module, name: str, values: Tensor, *, pack: bool = False
) -> None:
    """Overwrite a parameter; what it was is kept where there is somebody to keep it."""
    if is_packed(module, name):
        write_weight(module, name, values, pack=pack)
        return
    parameter = _parameter(module, name)
    before = parameter.detach().clone() if undo is not None else None
    with torch.no_grad():
        parameter.copy_(values)
    if undo is not None:
        assert before is not None
        undo.replaced.append((module, name, before, parameter._version))

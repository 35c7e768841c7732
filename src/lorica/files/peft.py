"""LoRA in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.plates import Slot
from lorica.errors import AdapterFileError, LoricaWarning
from lorica.files.found import Found
from lorica.files.peft_config import parse_config
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.peft_plan import Plan, plan
from lorica.files.peft_written import to_peft, written_config
from lorica.files.safetensors_file import TensorFile
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.method import Method, Tensors

_SHOWN = 5


def fits(adapter: Adapter) -> bool:
    """Whether the adapter can be written in this layout.

    PEFT has DoRA on layers alone, not on bare parameters or in nn.MultiheadAttention.
    """
    if isinstance(adapter.method, DoRA):
        modules = modules_of(adapter.model)
        return all(path in modules for path in adapter.slots)
    return isinstance(adapter.method, LoRA)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config is of this layout."""
    return config.get("peft_type") == "LORA"


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that the adapter was made for."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors. Raises AdapterFileError where a place has no name."""
    adapter = _plain_start(_expanded(adapter))
    written = to_peft(adapter)
    if written.unreadable:
        warnings.warn(
            f"PEFT's layout cannot name {len(written.unreadable)} of the adapted places "
            f"({', '.join(written.unreadable[:3])}): Lorica reads this adapter back, PEFT does not",
            LoricaWarning,
            stacklevel=3,
        )
    return written_config(adapter, written), written.tensors


def _expanded(adapter: Adapter) -> Adapter:
    """An adapter that began from parts of the weight, as plain LoRA of twice the rank.

    PEFT's base would have lost those parts; ours has not, and this form means the same on it.
    """
    method = adapter.method
    if not isinstance(method, LoRA) or not method.subtracts:
        return adapter
    slots = {}
    for path, slot in adapter.slots.items():
        own = slot.method
        if isinstance(own, LoRA):
            experts = slot.tensors["A"].dim() == 3 and path not in modules_of(adapter.model)
            A, B = own.factors(dict(slot.tensors), experts=experts)
            tensors = {"A": nn.Parameter(A.detach()), "B": nn.Parameter(B.detach())}
            slots[path] = Slot(own.expanded(), tensors)
        else:
            slots[path] = slot
    return replace(adapter, method=method.expanded(), slots=slots)


def _plain_start(adapter: Adapter) -> Adapter:
    """An adapter whose start records decided, as one of the plain start: the file holds what came
    of it, at the ranks that came of it.
    """
    method = adapter.method
    if not isinstance(method, LoRA) or not method.needs_records:
        return adapter
    return replace(adapter, method=method.stand_in())


def settings(raw: Mapping[str, Any], folder: Path) -> Method:
    """The settings that a config describes. Raises AdapterFileError for what we do not know."""
    return parse_config(raw, str(folder / "adapter_config.json")).method


def read(model: nn.Module, raw: Mapping[str, Any], file: TensorFile, folder: Path) -> Found:
    """Find the place of every tensor, then read them.

    Raises:
        AdapterFileError: the config or the tensors do not fit; all problems at once.
    """
    config = parse_config(raw, str(folder / "adapter_config.json"))
    found = plan(model, {key: entry.shape for key, entry in file.entries.items()}, config)
    _check_plan(found, model, folder)
    tensors = _read(file, found)
    tied = {path for path, (_, _, own) in found.places.items() if getattr(own, "tied_to", None)}
    places = {path: place for path, place in found.places.items() if path in {*tensors, *tied}}
    return Found(config.method, places, tensors, config.base_name, config.task)


def _check_plan(found: Plan, model: nn.Module, folder: Path) -> None:
    """One error for all tensors that do not fit, with counts and the likely cause."""
    problems = []
    kinds = {
        "tensors of the file have no place in this model": found.unexpected,
        "tensors are missing from the file": found.missing,
        "tensors have other shapes than the base needs": found.misshapen,
    }
    for what, single in kinds.items():
        if single:
            shown = [f"    {text}" for text in single[:_SHOWN]]
            problems += [f"{len(single)} {what}, such as", *shown]
    if not found.places and not problems:
        problems = ["the file holds no tensors"]
    if problems:
        raise AdapterFileError(
            f"{folder} does not fit this {type(model).__name__}",
            problems=problems,
            mend=_prefix_hint(found, model) or "load the base that the adapter was made for",
        )


def _prefix_hint(found: Plan, model: nn.Module) -> str | None:
    """Whether the paths would fit with more or fewer names in front."""
    stems = [text.split(":")[0] for text in found.unexpected[:50]]
    paths = {path for path in modules_of(model) if path}
    for stem in stems:
        path = stem.removeprefix(PREFIX).split(".lora_")[0]
        parts = path.split(".")
        for cut in range(1, len(parts) - 1):
            if ".".join(parts[cut:]) in paths:
                extra = ".".join(parts[:cut])
                return (
                    f"the file's paths start with {extra!r}, which this model lacks: load the "
                    "class of model that has it"
                )
        if longer := min((p for p in paths if p.endswith(f".{path}")), default=None):
            extra = longer.removesuffix(f".{path}")
            return (
                f"this model's paths start with {extra!r}, which the file lacks: load the adapter "
                f"on model.{extra}"
            )
        if not stem.startswith(PREFIX) and ".lora_" in stem:
            return f"keys of PEFT start with {PREFIX!r}; this file has another layout"
    return None


def _read(file: TensorFile, found: Plan) -> dict[str, Tensors]:
    """The tensors of every place, checked to be finite, in the order of the file."""
    for key, own in found.repeated.items():
        if not torch.equal(file.read(key).to(own.dtype), own.detach().cpu()):
            raise AdapterFileError(
                f"{key} differs from the base: the base of this adapter had other weights there",
                mend="load that base, for example with its enlarged vocabulary",
            )
    tensors: dict[str, Tensors] = {}
    for path, (spot, keys) in found.factors.items():
        read = {factor: _wide(file.read(key)) for factor, key in keys.items()}
        A, B = read["A"], read["B"]
        if (
            spot.core != spot.path
            and spot.matched in _attentions(found)
            and not (A.any() or B.any())
        ):
            continue  # PEFT has factors for both projections of an attention; these say nothing
        tensors[path] = spot.from_file(**read)
    for path, keys in found.copies.items():
        tensors[path] = {name: _wide(file.read(key)) for name, key in keys.items()}
    for path, (key, tokens) in found.rows.items():
        indices, order = torch.tensor(list(tokens)).sort()
        tensors[path] = {"rows": _wide(file.read(key))[order], "indices": indices}
    assert set(tensors) <= set(found.places)
    return tensors


def _attentions(found: Plan) -> set[str]:
    return {
        spot.core
        for spot, _ in found.factors.values()
        if isinstance(found.places[spot.path][0], nn.MultiheadAttention)
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

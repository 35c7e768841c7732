"""The settings of an adapter that a run begins from, where the user gives no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorica.config import Layer
from lorica.config.names import ALIASES
from lorica.config.settings import STATE, Preset

_ALIKE = ({"lora", "lora-fa"}, {"selective", "lisa"}, {"prompt-tuning", "p-tuning"})
"""Kinds that differ in how they train only; the first is the one to go on with."""
_OWN = {
    "init_lora_weights",
    "init_records",
    "eva_rho",
    "eva_tau",
    "lora_ga_gamma",
    "loftq_iter",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "reinit_top_layers",
    "prefix_projection",
    "encoder_hidden_size",
    "modules_to_save",
    "trainable_token_indices",
}
"""Settings of a method that belong to its start or its task, not to its shapes."""


def shaped_by_source(layers: Sequence[Layer]) -> list[Layer]:
    """The layers of settings, below them those of the adapter that `init_adapter` names: its method
    if none is given, and if it is that method, what decides about ranks, scales and places.

    Raises:
        AdapterFileError: the folder holds an adapter that Lorica does not know.
    """
    from lorica.cli.opening import adapter_folder
    from lorica.files.adapter import settings_of
    from lorica.methods import WORDS

    given: dict[str, Any] = {}
    for layer in layers:
        given |= {ALIASES.get(key, key): value for key, value in layer.values.items()}
    path = given.get("init_adapter")
    folder = adapter_folder(Path(path)) if isinstance(path, str) else None
    if folder is None or given.get("stages") is not None:  # told where it is opened
        return list(layers)
    source = settings_of(folder)
    word = given.get("method", _go_on_with(source.kind))
    chosen: Any = WORDS.get(word) if isinstance(word, str) else None
    chosen = chosen.method if isinstance(chosen, Preset) else chosen
    kind = getattr(chosen, "kind", None)
    if kind is None or (kind != source.kind and not _alike(kind, source.kind)):
        return list(layers)  # refused with the difference when both are there
    known = {field.name for field in fields(chosen)}
    values = {name: value for name, value in _shapes(source).items() if name in known}
    below = Layer(f"init_adapter {path}", {"method": word, **values})
    return [below, *layers]


def _alike(one: str, other: str) -> bool:
    return any({one, other} <= kinds for kinds in _ALIKE)


def _go_on_with(kind: str) -> str:
    """A network that made a prompt is in no file, so only the prompt itself can go on."""
    return "prompt-tuning" if kind == "p-tuning" else kind


def _shapes(method: Any) -> dict[str, Any]:
    """What of a method's settings is not its default, and decides about its tensors."""
    found = {}
    for field in fields(method):
        value = getattr(method, field.name)
        own = field.name in _OWN or "dropout" in field.name or field.metadata.get(STATE)
        if not own and value not in (field.default, {}, ()):
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found

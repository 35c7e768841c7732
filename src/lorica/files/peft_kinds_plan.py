"""Which tensor of a file of PEFT goes where, for the methods beside LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorica.attach.layers import describe
from lorica.attach.places import Places
from lorica.base.storage import weight_shape
from lorica.config.resolve import build_method
from lorica.files.peft_config import PeftConfig
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.peft_methods import KINDS, Kind, file_name, file_shape
from lorica.files.safetensors_file import TensorFile
from lorica.methods.copy import Copy
from lorica.methods.method import Layer, Tensors
from lorica.methods.patterns import unmatched_patterns
from lorica.methods.vera import VeRA, projection


class Plan:
    """Which tensor of a file goes where, found by names and shapes alone."""

    def __init__(self, model: nn.Module, kind: Kind, config: PeftConfig, method: Any) -> None:
        self.kind, self.config, self.method = kind, config, method
        self.name = next(name for name, own in KINDS.items() if own is kind)
        self.modules = modules_of(model)
        self.places: Places = {}
        self.wanted: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        """Path -> our name of a tensor -> its key, and our shape of it."""
        self.problems: list[str] = []

    def assign(self, file: TensorFile, given_up: Collection[str] = ()) -> None:
        """Fill `places` and `wanted`, or `problems`.

        Args:
            given_up: layers that the config selects, and the method left again.
        """
        entries = {
            key: tuple(entry.shape)
            for key, entry in file.entries.items()
            if key.removeprefix(PREFIX).rpartition(".")[0] not in given_up
        }
        shared = self._shared(file, entries) | self._repeated(file, entries)
        paths = self._paths(entries)
        layers = [describe(self.modules[path]) for path in paths]
        self.method = self.method.over(layers)
        for path, layer in zip(paths, layers, strict=True):
            self._layer(path, layer, entries)
        self._copies(entries)
        used = {key for own in self.wanted.values() for key, _ in own.values()} | shared
        lost = [key for key in entries if key not in used]
        self.problems += [f"{key}: has no place in this model" for key in lost]
        strange = unmatched_patterns(getattr(self.method, "rank_pattern", {}), paths)
        strange += [path for path in given_up if path not in self.modules]
        self.problems += [f"rank_pattern: {path} is no layer of the file" for path in strange]
        for path, module in self.modules.items():
            absent = self.kind.sits_on(module) and path not in self.places
            if absent and path not in given_up and self.config.selects(path):
                self.problems.append(f"{PREFIX}{path}: its tensors are missing from the file")

    def read(self, file: TensorFile, path: str) -> Tensors:
        """The tensors of one place, in our shapes."""
        return {
            name: _wide(file.read(key)).reshape(shape)
            for name, (key, shape) in self.wanted[path].items()
        }

    def _shared(self, file: TensorFile, entries: Mapping[str, tuple[int, ...]]) -> set[str]:
        """VeRA's random pair: it follows from the key, and must be the one that we make."""
        keys = ("base_model.vera_A", "base_model.vera_B")
        if self.name != "VERA" or not all(key in entries for key in keys):
            return set()
        (r, widest_in), (widest_out, _) = entries[keys[0]], entries[keys[1]]
        if r == self.method.r:
            self.method = build_method(
                VeRA, {**_settings(self.method), "widths": [widest_in, widest_out]}
            )
            pair = projection(self.method.projection_prng_key, r, widest_in, widest_out)
            if all(torch.equal(file.read(k).float(), p) for k, p in zip(keys, pair, strict=True)):
                return set(keys)
        self.problems.append(
            f"{keys[0]} and B: not the pair that projection_prng_key="
            f"{self.method.projection_prng_key} gives"
        )
        return set(keys)

    def _repeated(self, file: TensorFile, entries: Mapping[str, tuple[int, ...]]) -> set[str]:
        """The base's embeddings, which PEFT writes beside adapters on them: they must be ours."""
        found = set()
        for key, shape in entries.items():
            path, mark, _ = key.removeprefix(PREFIX).rpartition(".base_layer.weight")
            if not mark or not isinstance(self.modules.get(path), nn.Embedding):
                continue
            own = cast(Tensor, self.modules[path]._parameters["weight"]).detach().cpu()
            if shape != own.shape or not torch.equal(file.read(key).to(own.dtype), own):
                self.problems.append(f"{key}: the base of this adapter had other weights there")
            found.add(key)
        return found

    def _paths(self, entries: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The layers that the file has tensors for, in the order of the model."""
        found = set()
        for key in entries:
            stem, mark, _ = key.removeprefix(PREFIX).rpartition(f".{self.kind.prefix}")
            if key.startswith(PREFIX) and mark:
                found.add(stem)
        return [
            path
            for path, module in self.modules.items()
            if path in found and self.kind.sits_on(module)
        ]

    def _layer(self, path: str, layer: Layer, entries: Mapping[str, tuple[int, ...]]) -> None:
        own = self.method.at(path)
        if self.config.selects(path) is False:
            self.problems.append(f"{PREFIX}{path}: the config does not name this place")
        if found := own.problems(layer):
            self.problems += [f"{path}: {problem}" for problem in found]
            return
        wanted = own.start(layer, torch.Generator())
        self.places[path] = self.modules[path], None, own
        self.wanted[path] = {}
        for name, tensor in wanted.items():
            key = f"{PREFIX}{path}.{file_name(self.kind, name, layer)}"
            shape = file_shape(self.name, name, tensor, layer, own)
            expected = tuple(tensor.reshape(shape).shape)
            if key not in entries:
                self.problems.append(f"{key}: missing from the file")
            elif entries[key] != expected:
                self.problems.append(f"{key}: {entries[key]}, but this base needs {expected}")
            self.wanted[path][name] = key, tuple(tensor.shape)

    def _copies(self, entries: Mapping[str, tuple[int, ...]]) -> None:
        """Modules trained whole."""
        for path, module in self.modules.items():
            if not path or not self.config.may_save_whole(path) or path in self.places:
                continue
            own = {
                name: weight_shape(module, name)
                for name, parameter in module._parameters.items()
                if parameter is not None
            }
            keys = {name: f"{PREFIX}{path}.{name}" for name in own}
            if not any(key in entries for key in keys.values()):
                continue
            self.places[path] = module, None, Copy()
            self.wanted[path] = {name: (key, own[name]) for name, key in keys.items()}
            for name, key in keys.items():
                if entries.get(key) != own[name]:
                    self.problems.append(f"{key}: missing, or not of {own[name]}")


def _settings(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

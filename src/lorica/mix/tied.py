"""Weights that several layers share: which must get values of their own, and which cannot."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from lorica.attach.handle import attached_to
from lorica.attach.survey import clean, survey
from lorica.base.ends import end_layer
from lorica.mix.target import Target


def find_ties(model: nn.Module, targets: list[Target]) -> tuple[dict[str, list[str]], list[str]]:
    """Parameters to untie, each with all names of the tie; and why others cannot be untied."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():  # a module under two names computes the same in both
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = clean(f"{path}.{name}" if path else name)
                owners.setdefault(id(parameter), []).append((full, module))
    idle = {f"{p.path}.weight" for p in survey(model).places.values() if p.shared and p.refusal}
    overlapping = _overlapping(model)
    apart: dict[str, list[str]] = {}
    problems: list[str] = []
    for target in targets:
        sharers = owners[id(target.parameter)]
        called = [path for path, _ in sharers if path not in idle]
        if len(sharers) > 1 and not _moves_as_one(target, targets, len(called)):
            others = ", ".join(path for path, _ in sharers if path != target.path)
            if _can_untie(model, [module for _, module in sharers]):
                apart[target.path] = [path for path, _ in sharers]
            else:
                problems.append(
                    f"{target.path}: its weight is also that of {others}, where the update does "
                    f"not belong, and {type(model).__name__} has no setting that unties them; keep "
                    "the adapter apart"
                )
        elif id(target.parameter) in overlapping:
            problems.append(f"{target.path}: its memory is shared with another parameter")
    return apart, problems


def _moves_as_one(target: Target, targets: list[Target], num_called: int) -> bool:
    """Whether every layer that is called with this weight gets the very same update, so that it
    stays shared.
    """
    together = [t for t in targets if t.parameter is target.parameter]
    updates = {tuple((share, id(slot.tensors)) for share, slot in t.parts) for t in together}
    return len(together) == num_called and len(updates) == 1


def _can_untie(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether these are the input embedding and the output layer, and only the config ties them.

    Encoder-decoder models tie four weights, and some scale their output by the tie: they stay.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or len(modules) != 2:
        return False
    if getattr(config, "is_encoder_decoder", False):
        return False
    ends = [end_layer(model, "get_input_embeddings"), end_layer(model)]
    return all(any(module is end for end in ends) for module in modules)


def _overlapping(model: nn.Module) -> set[int]:
    """Parameters that are different objects over the same memory."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), str(p.device), id(p))
        for p in model.parameters()
        if p.numel() and not p.is_meta
    )
    found: set[int] = set()
    for (_, end, device, one), (start, _, other_device, two) in pairwise(spans):
        if start < end and device == other_device:
            found |= {one, two}
    return found


def untie(model: nn.Module, apart: Mapping[str, list[str]]) -> None:
    """Give tied weights values of their own, and let the config say it, for the disk.

    The config has one switch for all ties, so parameters that it tied besides (the bias of a head)
    get their own copy too.
    """
    keys = getattr(model, "all_tied_weights_keys", None)
    modules = {clean(path): module for path, module in model.named_modules(remove_duplicate=False)}
    for path in [*apart, *(keys or ())]:
        core, _, name = path.rpartition(".")
        module = modules[core]
        parameter = module._parameters[name]
        if parameter is not None and _uses(model, parameter) > 1:
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module._parameters[name] = own
    config: Any = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if isinstance(keys, dict):
        keys.clear()
    unfrozen = attached_to(model).unfrozen  # it knew the tie by one of its names
    for paths in apart.values():
        if set(paths) & set(unfrozen):
            unfrozen += [path for path in paths if path not in unfrozen]


def _uses(model: nn.Module, parameter: nn.Parameter) -> int:
    """How many modules hold this very Parameter."""
    return sum(p is parameter for m in model.modules() for p in m._parameters.values())

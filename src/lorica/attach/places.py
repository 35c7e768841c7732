"""The places of a model that an adapter takes: which modules, or which parameters that are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lorica.attach.gates import attentions_of, is_gated, stack_of
from lorica.attach.intervene import blocks_of, is_intervention
from lorica.attach.layers import describe
from lorica.attach.params import select
from lorica.attach.probe import weight_read
from lorica.attach.prompt import is_prompt, stacks_of
from lorica.attach.targets import resolve
from lorica.attach.tokens import SETTING, add_rows
from lorica.base.known import base_of
from lorica.errors import ConfigError, TargetError, folded, nearest
from lorica.methods.copy import Copy
from lorica.methods.method import Layer, Method
from lorica.methods.patterns import unmatched_patterns
from lorica.methods.selective import Selective

Places = dict[str, tuple[nn.Module, str | None, Method]]
"""Path -> module, parameter where the weight is read and not the layer called, settings there."""


def seat(modules: Mapping[str, nn.Module], path: str) -> tuple[str, str | None]:
    """Path of the place that a layer offers, and its parameter where other code reads that."""
    parent, _, last = path.rpartition(".")
    if weight_read(modules.get(parent), last):
        return f"{path}.weight", "weight"
    return path, None


def places_of(model: nn.Module, method: Method) -> tuple[Places, Method, str]:
    """Where an adapter of this method goes, in the order of the model; the settings that fit all
    these places; and why it goes there.

    Raises:
        TargetError: a target matched nothing, or a layer cannot carry the adapter.
        ConfigError: a pattern of the settings matched nothing.
    """
    places, method, reason = _places(model, method)
    _check_places(places, method)
    return places, method, reason


def _places(model: nn.Module, method: Method) -> tuple[Places, Method, str]:
    if isinstance(method, Selective):
        chosen = select(model, method)
        copies: Places = {
            path: (module, None, Copy(only, chosen.tied.get(path), fresh=path in chosen.fresh))
            for path, (module, only) in chosen.modules.items()
        }
        whole = _copied(model, method.modules_to_save)
        copies.update({path: (module, None, Copy()) for path, module in whole.items()})
        return copies, method, chosen.reason
    copied = _copied(model, getattr(method, "modules_to_save", ()))
    if is_prompt(method):
        return _prompt_places(model, method, copied)
    if is_intervention(method):
        return _block_places(model, method, copied)
    settings: Any = method  # those of a method that is placed by name
    named = settings.target_modules
    targets = resolve(
        model,
        target_modules=settings.auto if named == "auto" else named,
        exclude_modules=settings.exclude_modules,
        layers_to_transform=settings.layers_to_transform,
    )
    names = dict(model.named_modules(remove_duplicate=False))
    taken: dict[str, tuple[str, nn.Module, str | None]] = {}  # path -> its name, for patterns
    for path in targets.modules:
        if path not in copied:
            host = settings.host(path)
            place, parameter = (host, None) if host != path else seat(names, path)
            taken[place] = path, names[host], parameter
    for path, (module, parameter) in targets.parameters.items():
        taken[path] = path, module, parameter
    settings = settings.over([describe(module, own) for _, module, own in taken.values()])
    reason = "; ".join(filter(None, [targets.reason, settings.decided(method)]))
    found: Places = {}
    if is_gated(settings):
        stacks = stack_of(model, settings)
        found.update({path: (stack, None, settings) for path, stack in stacks.items()})
    found.update({p: (module, own, settings.at(n)) for p, (n, module, own) in taken.items()})
    found.update({path: (module, None, Copy()) for path, module in copied.items()})
    add_rows(model, getattr(method, SETTING, ()), found)
    for setting in ("rank_pattern", "alpha_pattern"):
        paths = [*(name for name, _, _ in taken.values()), *copied]
        if missed := unmatched_patterns(getattr(method, setting, {}), paths):
            listed = ", ".join(map(repr, missed))
            raise ConfigError(
                f"{setting} has keys that match none of the adapted layers: {listed}",
                mend="give names as they end in the list of adapted layers, for example 'q_proj'",
            )
    return found, settings, reason


def _prompt_places(
    model: nn.Module, method: Any, copied: Mapping[str, nn.Module]
) -> tuple[Places, Method, str]:
    """Virtual tokens sit on the stack of layers; of an encoder-decoder model on both stacks."""
    if hasattr(method, "told"):
        base = base_of(model)
        method = method.told(base.tokenizer.encode if base and base.tokenizer else None)
    stacks = stacks_of(model, method)
    inside = attentions_of(model, method) if is_gated(method) else {}
    found: Places = {path: (m, None, method) for path, m in {**stacks, **inside}.items()}
    found.update({path: (module, None, Copy()) for path, module in copied.items()})
    where = " and ".join(type(stack).__name__ for stack in stacks.values())
    return found, method, f"{method.num_virtual_tokens} virtual tokens in front of {where}"


def _block_places(
    model: nn.Module, method: Any, copied: Mapping[str, nn.Module]
) -> tuple[Places, Method, str]:
    """Edits sit behind blocks, and on the stack around them."""
    chosen = blocks_of(model, method)
    found: Places = {path: (module, None, method) for path, module in chosen.items()}
    found.update({path: (module, None, Copy()) for path, module in copied.items()})
    first, last = method.prefix_positions, method.suffix_positions
    where = f"the first {first} and the last {last} tokens of the prompt"
    return found, method, f"behind {len(chosen) - 1} blocks, at {where}"


def _copied(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of `modules_to_save`, down to those that own parameters."""
    every = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    problems = []
    for name in names:
        roots = [path for path in every if path == name or path.endswith(f".{name}")]
        if not roots:
            near = nearest(name, {path.rpartition(".")[2] for path in every})
            problems.append(
                f"modules_to_save: {name!r} matches no module"
                + (f"; did you mean {near!r}?" if near else "")
            )
        for root in roots:
            inside = {p: m for p, m in every.items() if p == root or p.startswith(f"{root}.")}
            owners = {
                p: m
                for p, m in inside.items()
                if any(q is not None for q in m._parameters.values())
            }
            problems += (
                [f"modules_to_save: {root} has no parameters to train"] if not owners else []
            )
            problems += [
                f"modules_to_save: other code reads the weights of {path} instead of calling it"
                for path in owners
                if seat(every, path)[1] is not None
            ]
            found.update(owners)
    if problems:
        raise TargetError("modules to train whole were not found", problems=problems)
    return found


def _check_places(places: Places, method: Method) -> None:
    problems: list[tuple[str, str]] = []
    for path, (module, parameter, own) in places.items():
        if parameter is not None and module._parameters.get(parameter) is None:
            problems.append(
                (path, "a parametrization computes this weight, and other code reads it")
            )
            continue
        layer = describe(module, parameter)
        found = own.problems(layer)
        if parameter is not None:
            found = found + _read_problems(own, layer, cast(Tensor, module._parameters[parameter]))
        if own.replaces and any(p is not None and p.is_meta for p in module._parameters.values()):
            found = [*found, "there are no values to copy on the meta device"]
        problems += [(f"{path} ({layer.shape})", problem) for problem in found]
    if problems:
        raise TargetError(
            f"{method.kind} does not fit {len(problems)} of the layers",
            problems=folded(problems)[:20],
            mend=_way_out(method),
        )


def _way_out(method: Method) -> str | None:
    """What may be changed where a method does not fit a layer."""
    if is_prompt(method) or is_intervention(method):
        return None
    others = {"rank_pattern": "give them another rank with rank_pattern"}
    others["group_size"] = "give a smaller group_size"
    found = next((text for name, text in others.items() if hasattr(method, name)), None)
    return "leave them out with exclude_modules" + (f", or {found}" if found else "")


def _read_problems(method: Method, layer: Layer, weight: Tensor) -> list[str]:
    """Why an adapter cannot act on a weight that other code reads."""
    found = []
    if not hasattr(method, "delta"):
        found.append(f"{method.kind} cannot become a weight, and other code reads this one")
    if layer.geometry.get("groups", 1) > 1:
        found.append(
            "other code reads this weight, and the update of a grouped convolution is none"
        )
    if method.dropout:
        found.append(
            "dropout has no effect: other code reads this weight, so the layer's input is not seen"
        )
    if not weight.is_floating_point():
        found.append(f"other code reads this weight, and it is packed ({weight.dtype})")
    return found

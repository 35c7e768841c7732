"""Where a selection of the base's own parameters sits: module by module, with the names in each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from lorica.attach.probe import weight_read
from lorica.attach.survey import Survey, layer_number, survey
from lorica.attach.targets import spans, stack_of
from lorica.errors import TargetError, nearest
from lorica.methods.patterns import compiled
from lorica.methods.selective import Selective


@dataclass(eq=False)
class Selection:
    """What trains.

    Attributes:
        modules: path -> the module and the names of its parameters, in the order of the model.
        tied: path -> the one before it that has the very same parameter.
        fresh: those of its paths that begin anew.
        reason: what was chosen, in words.
    """

    modules: dict[str, tuple[nn.Module, tuple[str, ...]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    reason: str = ""


def select(model: nn.Module, method: Selective) -> Selection:
    """The parameters that a selection names.

    A weight that two modules share (a tied output layer) stays frozen, for copies would part; it
    trains as one where the method says so, and all of them are selected and have nothing else.

    Raises:
        TargetError: a name matches nothing, or nothing is left; all problems at once.
    """
    found, problems = survey(model), list[str]()
    paths = set(found.modules)
    if method.target_modules != "auto":
        paths &= _held(found, method.target_modules, "target_modules", problems)
    paths -= _held(found, method.exclude_modules, "exclude_modules", problems)
    paths &= _in_layers(found, method, problems)
    if method.parameters == "head":
        paths &= head_of(model, found)
    selection, seen, left = Selection(), set[int](), list[str]()
    owners = _owners(found)
    for path, module in found.modules.items():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        names = tuple(name for name in own if _fits(module, name, method))
        if path not in paths or not names or id(module) in seen:
            continue
        if method.ties and _in_name_only(found, path):
            continue
        shared = [p for name in names for p in owners[id(own[name])] if p != path]
        as_one = method.ties and _all_alike(found, [path, *shared], paths)
        if (shared and not as_one) or _is_read(found, path):
            left.append(path)
            continue
        seen.add(id(module))
        if first := next((p for p in shared if p in selection.modules), None):
            selection.tied[path] = first
        selection.modules[path] = module, names
    if not selection.modules and not problems:
        problems.append(f"no module has parameters of the kind {method.parameters!r}")
        problems += [f"{path} is tied to another module, or read by other code" for path in left]
    selection.fresh = _fresh(found, method, selection, problems)
    if problems:
        alone = method.parameters == "head" and not selection.modules and left
        mend = _untied(left[0]) if alone else None
        if method.parameters == "bias" and not selection.modules and not left:
            mend = "this base has no biases; `method: norms` trains about as few parameters"
        raise TargetError("the parameters cannot be selected", problems=problems, mend=mend)
    selection.reason = _reason(method, selection, left)
    return selection


def _untied(head: str) -> str:
    """What to do where an output layer shares its weight, so that no copy of it can train."""
    name = head.rpartition(".")[2]
    return (
        f"give it an update of its own, which leaves the shared weight alone: method: lora with "
        f"target_modules: {name}"
    )


def _fits(module: nn.Module, name: str, method: Selective) -> bool:
    if method.parameters == "bias":
        return name.endswith("bias")
    return method.parameters in ("all", "head") or "norm" in type(module).__name__.lower()


def head_of(model: nn.Module, found: Survey) -> set[str]:
    """The modules that are no part of the body: behind the base model of transformers, else by
    what the layers are called.
    """
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()} if isinstance(body, nn.Module) else set()
    if body is not model and inside:
        return {path for path, module in found.modules.items() if id(module) not in inside}
    return {place.path for place in found.places.values() if place.role == "head"}


def _fresh(found: Survey, method: Selective, selection: Selection, problems: list[str]) -> set[str]:
    """The last layers of every stack, and the pooler, as many as are to begin anew."""
    k = method.reinit_top_layers
    if not isinstance(k, int) or not k:
        return set()
    inside = {p: n for p in found.modules if (n := layer_number(p)) is not None}
    ends = _ends(inside)
    _last(found, inside, k, problems, "reinit_top_layers")
    top = {path for path, number in inside.items() if number > ends[stack_of(path)] - k}
    top |= {path for path in found.modules if "pooler" in path.split(".")}
    owners = {p for p in top if any(q is not None for q in found.modules[p]._parameters.values())}
    missing = sorted(owners - set(selection.modules))
    problems += [
        f"reinit_top_layers: {path} does not train, so it cannot begin anew" for path in missing[:5]
    ]
    return owners & set(selection.modules)


def _is_read(found: Survey, path: str) -> bool:
    """Whether other code reads the weight of this module: a copy would have no effect there."""
    parent, _, last = path.rpartition(".")
    return weight_read(found.modules.get(parent), last)


def _owners(found: Survey) -> dict[int, list[str]]:
    """Parameter -> the modules that hold it, each by one path."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in found.modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), {}).setdefault(id(module), path)
    return {key: list(paths.values()) for key, paths in owners.items()}


def _all_alike(found: Survey, sharers: list[str], paths: set[str]) -> bool:
    """Whether all of these that are called are selected, and hold one parameter only."""
    return all(
        path in paths
        and not _is_read(found, path)
        and sum(p is not None for p in found.modules[path]._parameters.values()) == 1
        for path in sharers
        if not _in_name_only(found, path)
    )


def _in_name_only(found: Survey, path: str) -> bool:
    """Whether a layer shares its weight with those that are called, and is not called itself."""
    return path in found.places and bool(found.places[path].shared and found.places[path].refusal)


def _held(
    found: Survey, names: str | Collection[str], setting: str, problems: list[str]
) -> set[str]:
    """The modules that are named, and all that they hold."""
    held = set[str]()
    for name in [names] if isinstance(names, str) else names:
        pattern = compiled(name)
        heads = [path for path in found.modules if path and pattern.matches(path)]
        if not heads:
            near = nearest(name, {path.rpartition(".")[2] for path in found.modules})
            hint = f"; did you mean {near!r}?" if near else ""
            problems.append(f"{setting}: {name!r} matches nothing{hint}")
        roots = tuple(f"{head}." for head in heads)
        held |= {path for path in found.modules if path in heads or path.startswith(roots)}
    return held


def _in_layers(found: Survey, method: Selective, problems: list[str]) -> set[str]:
    """The modules in the layers that are asked for; all where none are."""
    numbers = {path: layer_number(path) for path in found.modules}
    inside = {path: number for path, number in numbers.items() if number is not None}
    if not method.outside:
        return _chosen_layers(found, inside, method, problems) & set(inside)
    return _chosen_layers(found, inside, method, problems)


def _chosen_layers(
    found: Survey, inside: dict[str, int], method: Selective, problems: list[str]
) -> set[str]:
    if method.last_layers is not None:
        return _last(found, inside, method.last_layers, problems, "last_layers")
    if method.layers_to_transform is None:
        return set(found.modules)
    wanted, wrong = spans(method.layers_to_transform)
    missing = sorted(wanted - set(inside.values()))
    problems += wrong
    problems += [f"layers_to_transform: there is no layer {number}" for number in missing]
    return {path for path, number in inside.items() if number in wanted}


def _ends(inside: dict[str, int]) -> dict[str, int]:
    """Stack -> the number of its last layer."""
    ends: dict[str, int] = {}
    for path, number in inside.items():
        stack = stack_of(path)
        ends[stack] = max(number, ends.get(stack, 0))
    return ends


def _last(
    found: Survey, inside: dict[str, int], k: int, problems: list[str], setting: str
) -> set[str]:
    """The last k layers of every stack, and what comes after all: norm, pooler, head."""
    ends = _ends(inside)
    too_few = [stack for stack, end in ends.items() if end + 1 < k]
    problems += [f"{setting}={k}, but {stack} has {ends[stack] + 1}" for stack in too_few]
    if not ends:
        problems.append(f"{setting}: the model has no numbered layers")
        return set()
    order = list(found.modules)
    after = set(order[max(order.index(path) for path in inside) + 1 :])
    return after | {p for p, number in inside.items() if number > ends[stack_of(p)] - k}


def _reason(method: Selective, selection: Selection, left: list[str]) -> str:
    count = sum(len(names) for _, names in selection.modules.values())
    text = f"{method.parameters}: {count} parameters of {len(selection.modules)} modules"
    if method.last_layers:
        text += f", the last {method.last_layers} layers and what follows"
    if selection.fresh:
        text += (
            f", the last {method.reinit_top_layers} layers ({len(selection.fresh)} modules) anew"
        )
    if left:
        shown = ", ".join(left[:3])
        text += f"; {len(left)} stay frozen, being tied or read by other code ({shown})"
    return text

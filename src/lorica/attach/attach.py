"""Put an adapter on a model and take it off again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorica.attach.fresh import fresh_parameters
from lorica.attach.gates import attentions_of, is_gated, stack_of
from lorica.attach.intervene import blocks_of, is_intervention
from lorica.attach.layers import describe
from lorica.attach.params import select
from lorica.attach.probe import weight_read
from lorica.attach.prompt import is_prompt, stacks_of
from lorica.attach.site import Slot, Status, check_unchanged, enter, is_site, leave, plates_of
from lorica.attach.stages import check_stack, check_stages, check_union, lay_on, let_rest
from lorica.attach.survey import unwrap
from lorica.attach.targets import resolve
from lorica.attach.tokens import SETTING, add_rows
from lorica.base.image_pipeline import guided_paths
from lorica.base.load import base_of
from lorica.errors import ConfigError, TargetError, folded, nearest
from lorica.methods.copy import Copy
from lorica.methods.method import Layer, Method, Tensors, is_chosen
from lorica.methods.patterns import unmatched_patterns
from lorica.methods.selective import Selective

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(eq=False)
class Adapter:
    """The handle of an adapter on a model: the door to what trains.

    Attributes:
        name: its name on this model.
        method: the settings that made it.
        slots: what it holds, by place: a module's path, or that of a parameter.
        reason: why it sits where it sits.
        base: what is known of the base it was made on (name, digest, task), for its files.
        began_from: the adapter whose tensors were its start, for its files; empty without one.
        model: the model that it was put on, whose module names its files need.
        on: the adapter that it was put on top of: acting wherever this one acts.
        together: whether that one trains with this one; otherwise it is frozen.
        stacked: whether this one is given what that one made of a layer's output; otherwise both
            are given the base's, and what they add is summed.
        comes_along: whether it was read together with the adapter on top of it, and goes with that.
        noted: what its files said of it beside settings and tensors.
    """

    name: str
    method: Method
    slots: dict[str, Slot]
    model: nn.Module = field(repr=False)
    reason: str = ""
    base: dict[str, str] = field(default_factory=dict)
    began_from: dict[str, str] = field(default_factory=dict)
    on: Adapter | None = None
    together: bool = False
    stacked: bool = False
    comes_along: bool = False
    noted: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[Adapter]:
        """What acts with it, the lowest first, and itself."""
        return [*(self.on.stages if self.on is not None else []), self]

    @property
    def parts(self) -> list[Adapter]:
        """What trains as one adapter: those that train together with it, and itself, the last."""
        return [*(self.on.parts if self.on is not None and self.together else []), self]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and tensor of everything that trains, in the order of the model."""
        if self.on is not None and self.together:
            yield from ((f"on/{key}", tensor) for key, tensor in self.on.named_parameters())
        for path, slot in self.slots.items():
            for key, tensor in slot.tensors.items():
                if tensor.requires_grad and not tied_to(slot):
                    yield f"{path}.{key}", tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer is given."""
        return (tensor for _, tensor in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters())

    def __repr__(self) -> str:
        size = f"{len(self.slots)} places, {self.num_parameters:,} parameters"
        return f"Adapter({self.name!r}, {self.method.kind}, {size})"


@dataclass(eq=False)
class Attached:
    """Everything that attaching left on a model; kept in the root module's `__dict__`."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    unfrozen: list[str] = field(default_factory=list)
    """Base parameters that required gradients before the first adapter came."""


def tied_to(slot: Slot) -> str | None:
    """The place whose tensors these are, where two layers share one weight."""
    return getattr(slot.method, "tied_to", None)


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    seed: int = 0,
    on: str | Adapter | None = None,
    together: bool = False,
    stacked: bool = False,
) -> Adapter:
    """Put a fresh adapter on `model` and freeze the base.

    The model answers as before until the adapter is activated, and at its start it is the identity
    even then, but for layers that begin anew (`Selective.reinit_top_layers`). Module paths,
    `state_dict()`, `parameters()` and `isinstance` are as they were: the tensors that train are
    reached through the returned handle, and saving the model saves the bare base.

    Args:
        model: any module.
        method: the settings, for example `LoRA(r=8, target_modules="all-linear")`.
        name: a name that no adapter of this model has yet.
        seed: the start of every tensor depends on the seed and on the name of its place only.
        on: an adapter that is to stay below this one. It is frozen until this one is detached, and
            acts wherever this one acts: the updates of both are added.
        together: train the adapter of `on` with this one, as one adapter of several methods.
        stacked: give this one, at every layer, what the adapter of `on` made of the layer's output
            instead of adding the updates of both.

    Raises:
        TargetError: a target matched nothing, or a layer cannot carry the adapter. The model is
            unchanged.
        ConfigError: the name is taken or unusable; a pattern of the settings matched nothing.
    """
    model = unwrap(model)
    _check_name(name, attached_to(model))
    below = find(model, on) if on is not None else None
    check_stages(method, below)
    check_union(method, below, together)
    check_stack(below, stacked)
    if is_chosen(method):
        raise ConfigError(
            f"these settings of {method.kind} need records or all weights together: they decide "
            "its places or start",
            mend="use lorica.attach_by_records(model, method, task, examples)",
        )
    if isinstance(method, Selective) and method.candidates:
        raise ConfigError(
            f"reinit_top_layers is {list(method.candidates)}: a trial must choose one of them",
            mend="give one number, or choose by lorica.train.trial.choose_top_layers(...)",
        )
    places, method, reason = places_of(model, method)

    def start(path: str, own: Method, layer: Layer) -> Tensors:
        if is_prompt(own) and layer.kind == "model" and path != next(iter(places)):
            return {}  # the decoder, which looks at what the encoder makes of them
        generator = _generator(seed, path)
        if isinstance(own, Copy) and own.fresh:
            return fresh_parameters(model, path, places[path][0], generator)
        return own.start(layer, generator)

    adapter = _put(model, method, places, start, name, reason)
    if below is not None:
        lay_on(adapter, below, together, stacked)
    return adapter


def attach_tensors(
    model: nn.Module,
    method: Method,
    places: Places,
    tensors: Mapping[str, Tensors],
    *,
    name: str = "default",
    reason: str = "",
) -> Adapter:
    """Put an adapter on `model` whose tensors exist already, such as one read from a file.

    Args:
        method: the settings of the whole adapter.
        places: where it goes; see `seat` for the path of a place.
        tensors: what it holds, by the paths of `places`, in the shapes of the methods there; the
            caller has checked them. They are taken over, not copied.

    Raises:
        ConfigError: the name is taken or unusable. The model is unchanged.
    """
    model = unwrap(model)
    _check_name(name, attached_to(model))
    return _put(model, method, places, lambda path, own, layer: tensors[path], name, reason)


def _put(
    model: nn.Module,
    method: Method,
    places: Places,
    start: Callable[[str, Method, Layer], Tensors],
    name: str,
    reason: str,
) -> Adapter:
    """Make the sites; on any error the model is left as it was."""
    attached = attached_to(model)
    slots: dict[str, Slot] = {}
    guided = guided_paths(model)
    try:
        for path, (module, parameter, own) in places.items():
            plates = enter(module, path, attached.status, parameter)
            plates.guided = any(not one or path.startswith(f"{one}.") for one in guided)
            if (tie := getattr(own, "tied_to", None)) is not None:
                held = slots[tie].tensors
            else:
                held = _parameters(start(path, own, plates.layer), module, own.frozen)
            slots[path] = plates.slots[name] = Slot(own, held)
    except BaseException:
        _withdraw(model, name)
        raise
    known = base_of(model)
    base = known.facts() if known is not None else {}
    adapter = Adapter(name, method, slots, model, reason, base)
    _register(model, attached, adapter)
    return adapter


def _register(model: nn.Module, attached: Attached, adapter: Adapter) -> None:
    """Enter an adapter in the model's record; the first one freezes the base."""
    if not attached.adapters:
        attached.unfrozen = [n for n, p in model.named_parameters() if p.requires_grad]
        model.requires_grad_(False)
    attached.adapters[adapter.name] = adapter
    model.__dict__["_lorica_attached"] = attached


def detach(model: nn.Module, adapter: str | Adapter) -> None:
    """Take an adapter off. With the last one gone the model is what it was: the same objects, the
    same bits.

    An activation in which it takes part ends. The adapter below it may train again; one that was
    read from the same folder goes with it.

    Raises:
        ConfigError: no such adapter, or another one lies on top of it.
        LoricaError: another library changed a site after it was made; nothing was changed.
    """
    model = unwrap(model)
    attached = attached_to(model)
    found = find(model, adapter)
    name, below, others = found.name, found.on, list(attached.adapters.values())
    if above := [other.name for other in others if other.on is found]:
        raise ConfigError(
            f"the adapter {name!r} lies below {above[0]!r}, which would not be what it was trained "
            "to be without it",
            mend=f"detach {above[0]!r} first",
        )
    _withdraw(model, name)
    _end_activation(model, name, attached.status)
    del attached.adapters[name]
    if below is not None and not any(o.on is below for o in others if o is not found):
        let_rest(below, False)
        if below.comes_along:
            detach(model, below)
            return
    if not attached.adapters:
        for path, parameter in model.named_parameters():
            if path in attached.unfrozen:
                parameter.requires_grad_(True)
        del model.__dict__["_lorica_attached"]


def put_back(adapter: Adapter) -> None:
    """Put an adapter that was detached on its model again: the same handle, the same tensors.

    Raises:
        ConfigError: its name was taken meanwhile.
    """
    model = adapter.model
    attached = attached_to(model)
    _check_name(adapter.name, attached)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, slot in adapter.slots.items():
        core, _, name = path.rpartition(".")
        module, parameter = (modules[path], None) if path in modules else (modules[core], name)
        enter(module, path, attached.status, parameter).slots[adapter.name] = slot
    _register(model, attached, adapter)
    if adapter.on is not None:
        lay_on(adapter, adapter.on, adapter.together, adapter.stacked)


def reshape(
    adapter: Adapter, method: Method, held: Mapping[str, tuple[Method, Mapping[str, Tensor]]]
) -> None:
    """Give an adapter other settings, and some of its places other settings and tensors.

    Args:
        held: by path; a place for which there are no tensors is given up.
    """
    for path, (own, tensors) in held.items():
        slot = adapter.slots[path]
        slot.method = own
        slot.tensors = {
            key: nn.Parameter(tensor.detach().clone(), requires_grad=key not in own.frozen)
            for key, tensor in tensors.items()
        }
    given_up = [adapter.slots.pop(path) for path, (_, tensors) in held.items() if not tensors]
    for module in [m for m in adapter.model.modules() if is_site(m)]:
        for plates in plates_of(module):
            if any(plates.slots.get(adapter.name) is slot for slot in given_up):
                del plates.slots[adapter.name]
        if not any(plates.slots for plates in plates_of(module)):
            leave(module)
    adapter.method = method


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name, in the order in which they came."""
    return dict(attached_to(model).adapters)


def find(model: nn.Module, adapter: str | Adapter) -> Adapter:
    """The handle of an adapter by name or handle. Raises ConfigError with the nearest name."""
    name = adapter.name if isinstance(adapter, Adapter) else adapter
    known = attached_to(model).adapters
    if name not in known:
        near = nearest(str(name), known)
        there = ", ".join(known) or "none"
        raise ConfigError(
            f"no adapter {name!r} is attached to this model",
            expected=f"one of: {there}",
            mend=f"did you mean {near!r}?" if near else None,
        )
    return known[name]


def attached_to(model: nn.Module) -> Attached:
    """The record of what sits on `model`; a fresh one where nothing does."""
    return unwrap(model).__dict__.get("_lorica_attached") or Attached()


def _check_name(name: str, attached: Attached) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of an adapter",
            expected="letters, digits, '.', '_' and '-', at most 64 of them",
        )
    if name in attached.adapters:
        raise ConfigError(
            f"an adapter {name!r} is attached already",
            mend="choose another name, or detach it first",
        )


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


def _withdraw(model: nn.Module, name: str) -> None:
    """Drop the slots of one adapter; sites without any become plain layers again."""
    sites = [m for m in model.modules() if is_site(m)]
    empty = [m for m in sites if all(set(p.slots) <= {name} for p in plates_of(m))]
    for module in empty:
        check_unchanged(module)
    for module in empty:
        leave(module)
    for module in sites:
        for plates in plates_of(module):
            plates.slots.pop(name, None)


def _end_activation(model: nn.Module, name: str, status: Status) -> None:
    """Let nothing act, if this adapter was to: a later one of its name must not step in."""
    places = [p for m in model.modules() for p in plates_of(m)]
    if any(p.route is not None and name in p.route.names for p in places):
        status.owner = None
        if status.schedule is not None:
            status.schedule.stop()
            status.schedule = None
        for place in places:
            place.route = None


def _parameters(
    tensors: Tensors, module: nn.Module, frozen: frozenset[str]
) -> dict[str, nn.Parameter]:
    own = (p for p in module._parameters.values() if p is not None)
    device = next((p.device for p in (*own, *module.parameters())), torch.device("cpu"))
    if device.type == "meta":  # values that cannot be made again are kept
        device = torch.device("cpu")
    return {
        key: nn.Parameter(tensor.to(device), requires_grad=key not in frozen)
        for key, tensor in tensors.items()
    }


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

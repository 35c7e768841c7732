"""Put an adapter on a model and take it off again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lorica.attach.fresh import fresh_parameters
from lorica.attach.handle import Adapter, Attached, attached_to, check_name, find
from lorica.attach.places import Places, places_of
from lorica.attach.plates import Slot, Status, plates_of
from lorica.attach.prompt import is_prompt
from lorica.attach.site import check_unchanged, enter, is_site, leave
from lorica.attach.stages import check_stack, check_stages, check_union, lay_on, let_rest
from lorica.attach.survey import unwrap
from lorica.base.foreign import check_foreign, hold, release
from lorica.base.image_pipeline import guided_paths
from lorica.base.known import base_of
from lorica.errors import ConfigError
from lorica.methods.copy import Copy
from lorica.methods.method import Layer, Method, Tensors, is_chosen
from lorica.methods.selective import Selective


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
        BaseModelError: bitsandbytes would compute wrongly, or without gradients; see
            `base.foreign`.
    """
    model = unwrap(model)
    check_name(name, attached_to(model))
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
    check_name(name, attached_to(model))
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
    check_foreign(model)
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
        attached.held = hold(model)
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
        release(attached.held)
        del model.__dict__["_lorica_attached"]


def put_back(adapter: Adapter) -> None:
    """Put an adapter that was detached on its model again: the same handle, the same tensors.

    Raises:
        ConfigError: its name was taken meanwhile.
        BaseModelError: as `attach`.
    """
    model = adapter.model
    check_foreign(model)
    attached = attached_to(model)
    check_name(adapter.name, attached)
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

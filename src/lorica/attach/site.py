"""A site: a layer of the base whose class was swapped for one that adds the adapters put there.

The layer stays the same object under the same path: `state_dict`, `parameters()` and `isinstance`
answer as before, and leaving is one assignment back. The adapters' tensors lie in `Plates`, one per
site; which of them act is the `Route` on the plates that `activate` writes at every site; what they
make of the layer's output is in `attach.output`.

Two kinds of site. A *forward site* is a layer that its parent calls: it adds to the output. A
*weight site* is a layer, or a bare parameter, whose weight other code reads (attention modules of
torch, expert weights in one 3-D parameter): reading the parameter gives W + s B A. Why this
mechanism and none of four others was measured before anything was built; the figures are in
docs/design.md.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lorica.attach.layers import describe, to_stored
from lorica.attach.output import add_adapters, covers_all, run_copy, run_whole, segments_of_dense
from lorica.attach.plates import Plates, Status, plates_of
from lorica.base.storage import packed_weight
from lorica.errors import ActivationError, LoricaError
from lorica.ops.lora import adapted_linear


class Site:
    """Mixed in before the class of the original layer; see `site_class`."""

    _lorica_base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plates: Plates = self.__dict__["_lorica"]
        plates.status.warn_undecided()
        plates.note_visit()
        names = plates.acting()
        if names and covers_all(plates) and plates.slots[names[0]].method.replaces:
            return run_copy(self, plates.slots[names[0]], *args, **kwargs)
        # accelerate and others put a forward on the instance
        inner = self.__dict__.get("_lorica_inner") or super().forward  # pyright: ignore
        if names and plates.layer.kind in ("model", "block"):
            return run_whole(self, inner, plates, names, args, kwargs)
        if names and (segments := segments_of_dense(self, plates, names, args, kwargs)):
            weight = packed_weight(cast(nn.Module, self)) or self.weight  # pyright: ignore
            return adapted_linear(args[0], weight, self.bias, segments)  # pyright: ignore
        y = inner(*args, **kwargs)
        return add_adapters(self, plates, names, y, args, kwargs) if names else y

    @property
    def lorica_virtual_tokens(self) -> int:
        """The most virtual tokens that an adapter puts in front of the input of this module."""
        slots = self.__dict__["_lorica"].slots.values() if "_lorica" in self.__dict__ else ()
        return max((getattr(slot.method, "num_virtual_tokens", 0) for slot in slots), default=0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The plates follow the device, never the dtype."""
        super()._apply(fn, recurse)  # pyright: ignore
        for plates in plates_of(cast(nn.Module, self)):
            for slot in plates.slots.values():
                for tensor in slot.tensors.values():
                    plates.to(fn(tensor.detach().new_empty(0)).device)
                    break
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:  # a class made here has no name to import
        own = type(self)
        return _rebuild, (own._lorica_base, _read_parameters(own)), self.__dict__.copy()


# --- weight sites ---------------------------------------------------------------------------------


def adapted_weight(module: Any, parameter: str) -> Tensor:
    """What code that reads the parameter of a weight site is given."""
    plates: Plates = module.__dict__["_lorica_weights"][parameter]
    weight: Tensor = module._parameters[parameter]
    plates.note_visit()
    names = plates.acting()
    if not names:
        return weight
    route = plates.route
    assert route is not None
    if route.segments is not None or (route.weights is not None and route.weights.dim() > 1):
        raise ActivationError(
            f"{plates.path}: its weight is read as a whole, so all rows share one mixture here",
            mend="activate one mixture for all rows, or leave this layer out of target_modules",
        )
    if route.stacked and names[1:] and not all(plates.slots[n].method.stacks for n in names):
        raise ActivationError(
            f"{plates.path}: other code reads its weight, so adapters cannot follow each other",
            mend="leave this layer out of target_modules",
        )
    result = weight
    for name in names:
        slot = plates.slots[name]
        method: Any = slot.method  # one that has a delta, as was checked when it was attached
        delta = to_stored(module, parameter, method.delta(slot.tensors, plates.layer))
        delta = delta.to(weight.dtype)
        if route.weights is not None:
            delta = delta * route.weights[route.names.index(name)].to(weight.dtype)
        result = result + delta
    return result


class WeightSite(Site):
    """A site whose parameters are read, not called: through a property of the class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plates = plates_of(cast(nn.Module, self))[0]
        plates.status.warn_undecided()  # reading a weight alone is no forward pass
        inner = self.__dict__.get("_lorica_inner")
        return inner(*args, **kwargs) if inner else super(Site, self).forward(*args, **kwargs)  # pyright: ignore


# --- entering and leaving -------------------------------------------------------------------------

_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


def site_class(base: type[nn.Module], parameters: tuple[str, ...] = ()) -> type:
    """The cached subclass of `base` that is a forward site, or a weight site over `parameters`.

    Name, qualified name and module are those of `base`: other libraries match on them.
    """
    key = base, parameters
    if key not in _CLASSES:
        reads = {
            name: property(lambda self, name=name: adapted_weight(self, name))
            for name in parameters
        }
        _CLASSES[key] = type(
            base.__name__,
            (WeightSite if parameters else Site, base),
            {
                "_lorica_base": base,
                "_lorica_reads": parameters,
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                **reads,
            },
        )
    return _CLASSES[key]


def _read_parameters(own: type) -> tuple[str, ...]:
    return own._lorica_reads


def _rebuild(base: Any, parameters: tuple[str, ...]) -> nn.Module:
    module = base.__new__(base)
    module.__class__ = site_class(base, parameters)
    return module


def is_site(module: nn.Module) -> bool:
    """Whether adapters sit on this module."""
    return isinstance(module, Site)


def enter(module: nn.Module, path: str, status: Status, parameter: str | None = None) -> Plates:
    """Make `module` a site, if it is none yet, and return its plates.

    Args:
        path: the name of the place; for a weight site that of the parameter.
        status: shared by all sites of the model.
        parameter: the parameter that other code reads; None for a layer that is called.

    Raises:
        LoricaError: the module is a site of the other kind already.
    """
    if is_site(module):
        if (parameter is None) != ("_lorica" in module.__dict__):
            raise LoricaError(
                f"{path}: adapters sit here in another way already", mend="detach them first"
            )
        if parameter is None:
            return module.__dict__["_lorica"]
    base = getattr(type(module), "_lorica_base", type(module))
    if base.__reduce_ex__ is not object.__reduce_ex__:
        raise LoricaError(
            f"{path}: {base.__name__} has a way of its own to be copied, which a site would break"
        )
    if parameter is None:
        plates = Plates(path, describe(module), status)
        if "forward" in module.__dict__:
            module.__dict__["_lorica_inner"] = module.__dict__.pop("forward")
        module.__dict__["_lorica"] = plates
        module.__class__ = site_class(base)
        return plates
    weights = module.__dict__.setdefault("_lorica_weights", {})
    if parameter not in weights:
        weights[parameter] = Plates(path, describe(module, parameter), status)
        module.__class__ = site_class(base, tuple(sorted(weights)))
    return weights[parameter]


def check_unchanged(module: nn.Module) -> None:
    """Raises LoricaError where somebody changed the class or the forward of a site after us."""
    own: Any = type(module)
    base = getattr(own, "_lorica_base", None)
    if base is None or _CLASSES.get((base, own._lorica_reads)) is not own:
        raise LoricaError(
            f"{own.__name__}: its class was changed again after attaching", mend="undo that first"
        )
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) not in (
        Site.forward,
        WeightSite.forward,
    ):
        raise LoricaError(
            f"{own.__name__}: its forward was replaced after attaching", mend="undo that first"
        )


def leave(module: nn.Module) -> None:
    """Give the module its class back. Raises LoricaError as `check_unchanged` does."""
    check_unchanged(module)
    module.__dict__.pop("forward", None)  # one that a tool put back, bound to our class
    module.__class__ = getattr(type(module), "_lorica_base")  # noqa: B009
    for key in ("_lorica", "_lorica_weights"):
        module.__dict__.pop(key, None)
    if inner := module.__dict__.pop("_lorica_inner", None):
        module.__dict__["forward"] = inner

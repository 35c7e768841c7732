"""Fake tensors that remember what an operation makes of shapes that it has seen.

torch's `FakeTensorMode` has a cache of its own, and a hit in it takes some 300 microseconds of
Python: seventeen facts of every tensor, each tested for nine types. All layers of a model run the
same operations on the same shapes, so that nearly everything is a hit. `FakeTensors` looks first
into a memory with a shorter key, for dense tensors and plain arguments. Whether an operation may be
remembered at all is torch's decision: it is when torch's cache took it. Beside those are a few
that torch's cache leaves out because it cannot tell whose storage they return, which is seen here.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_PLAIN = {
    *(int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout),
    *(torch.memory_format, torch.Size),
}
"""Types of arguments that are their own key, beside their type: 1 and 1.0 give other dtypes."""
_BUT = {
    *(_aten._unsafe_view.default, _aten.split.Tensor, _aten.split_with_sizes.default),
    _aten.silu_backward.grad_input,
}
"""Operations whose shapes follow from those of their arguments, although torch's cache does not
take them: their results share the storage of an argument, or are one."""


class _Made(NamedTuple):
    """A tensor that an operation made: the argument at `place` itself (a number, or a name for
    `out=`), or another one of this shape, on the storage of that argument or (`place` None) on one
    of its own.
    """

    place: int | str | None
    itself: bool = False
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None


class _Unknown(Exception):
    """There is no key for an argument, or no description of what was made."""


class _Several(NamedTuple):
    """Several results, in a list or a tuple; None where there is none."""

    kind: type
    each: tuple[_Made | None, ...]


_memory: dict[tuple, _Made | _Several | None] = {}
"""Operation and arguments -> what it makes; None: that is left to torch. It holds no tensors."""


class FakeTensors(FakeTensorMode):
    """torch's fake tensors, remembering what was run on them. Real tensors may be among them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._facts: dict[torch.device, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            key = self._key(func, args, kwargs)
        except _Unknown:
            return super().__torch_dispatch__(func, types, args, kwargs)
        known = _memory.get(key)
        if isinstance(known, _Made):
            return self._again(known, args, kwargs)
        if known is not None:
            return known.kind(one and self._again(one, args, kwargs) for one in known.each)
        if key in _memory:
            return super().__torch_dispatch__(func, types, args, kwargs)
        before = _by_torch()
        given = tree_map_only(Tensor, self._faked, (args, kwargs))
        made = super().__torch_dispatch__(func, types, *given)
        taken, left = (a - b for a, b in zip(_by_torch(), before, strict=True))
        fit = func in _BUT or (taken and not left)
        _memory[key] = _description(made, args, kwargs, given) if fit else None
        return made

    def _faked(self, tensor: Tensor) -> Tensor:
        """As torch itself does it for real tensors among the arguments; its cache does not."""
        return tensor if type(tensor) is FakeTensor else self.from_tensor(tensor)

    def _key(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple:
        """Everything on which it depends what an operation makes. Raises _Unknown."""
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        kinds: set[type] = set()
        self._add(key, args, kinds)
        for name, value in kwargs.items():
            key.append(name)
            self._add(key, (value,), kinds)
        if Tensor in kinds and FakeTensor not in kinds:
            raise _Unknown  # torch keeps the numbers of constants
        return tuple(key)

    def _add(self, key: list[Any], values: Any, kinds: set[type]) -> None:
        for value in values:
            kind = type(value)
            if kind is FakeTensor or kind is Tensor:
                kinds.add(kind)
                self._add_tensor(key, value, kind)
            elif kind in _PLAIN:
                key += kind, value
            elif kind is list or kind is tuple:
                key += kind, len(value)
                self._add(key, value, kinds)
            elif kind is torch.Generator:
                key += kind, value.device
            else:
                raise _Unknown

    def _add_tensor(self, key: list[Any], tensor: Any, kind: type) -> None:
        dtype, device = tensor.dtype, tensor.device
        if kind is FakeTensor:
            device = tensor.fake_device
            if tensor.fake_mode is not self or tensor.constant is not None:
                raise _Unknown  # a constant has numbers
        if tensor.layout is not torch.strided or dtype.is_complex:  # may be a conjugate
            raise _Unknown
        key += tensor.shape, tensor.stride(), tensor.storage_offset(), dtype
        key += kind, device, tensor.requires_grad, tensor.is_inference()

    def _again(self, made: _Made, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The tensor that `made` describes."""
        place: Any = made.place
        source: Any = None
        if place is not None:
            source = kwargs[place] if isinstance(place, str) else args[place]
        if made.itself:
            return source
        device: Any = made.device
        if (facts := self._facts.get(device)) is None:
            with torch._C._DisableTorchDispatch():
                other = FakeTensor(self, torch.empty(0, device="meta"), device)
            facts = self._facts[device] = dict(vars(other))
        with torch._C._DisableTorchDispatch():
            if source is None:
                like = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            else:
                storage = source.untyped_storage()
                like = torch.empty(0, dtype=made.dtype, device="meta")
                like.set_(storage, made.offset, made.shape, made.stride)
            # as FakeTensor's own constructor does it, which takes six times as long
            tensor = Tensor._make_subclass(
                FakeTensor, like, dispatch_device=True, device_for_backend_keys=device
            )
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        vars(tensor).update(facts)
        return tensor


def bare(mode: type[TorchDispatchMode]) -> None:
    """Take off what torch wraps around a mode's `__torch_dispatch__` so that torch.compile does not
    look into it: nothing is compiled under these modes, and it is called for every operation.
    """
    mode.__torch_dispatch__ = inspect.unwrap(mode.__torch_dispatch__)  # type: ignore[method-assign]


bare(FakeTensors)


def _by_torch() -> tuple[int, int]:
    """Operations that torch's cache has taken so far, and those that it has not."""
    mode = FakeTensorMode
    return mode.cache_hits + mode.cache_misses, sum(mode.cache_bypasses.values())


def _description(
    made: Any, args: Any, kwargs: dict[str, Any], given: Any
) -> _Made | _Several | None:
    """What was made of the arguments `given`, which stand for `args` and `kwargs`, without the
    tensors; None where that cannot be told.
    """
    places = dict(enumerate(given[0])) | given[1]
    real = {k for k, value in (dict(enumerate(args)) | kwargs).items() if type(value) is Tensor}
    try:
        if type(made) in (list, tuple):
            each = tuple(None if one is None else _described(one, places, real) for one in made)
            pairs = [(d, one) for d, one in zip(each, made, strict=True) if d is not None]
            fresh = [one.untyped_storage()._cdata for d, one in pairs if d.place is None]
            if len({*fresh}) < len(fresh):  # several on one storage that is none's
                return None
            return _Several(type(made), each)
        return _described(made, places, real)
    except _Unknown:
        return None


def _num_bytes(tensor: Tensor) -> int:
    """Of a storage that ends with the last element of a tensor."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _described(made: Any, places: dict[int | str, Any], real: set[int | str]) -> _Made:
    if type(made) is not FakeTensor:
        raise _Unknown
    found, storage = None, made.untyped_storage()
    for place, value in places.items():
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == storage._cdata:
            if place in real:  # its storage is not that of the fake one
                raise _Unknown
            if value is made:
                return _Made(place, itself=True)
            found = place
    shape, stride, offset = tuple(made.shape), made.stride(), int(made.storage_offset())
    if found is None and (offset or storage.nbytes() != _num_bytes(made)):
        raise _Unknown  # `_again` makes one for the shape alone
    return _Made(found, False, shape, stride, offset, made.dtype, made.fake_device)

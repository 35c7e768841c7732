"""Run a stack of layers up to the middle, and enter it there with hidden states that are known.

No code of a model is copied. For one forward pass, stand-ins take the places of layers in their
list: one that hands its input on, and one that says what it was told to say. Embeddings, masks and
positions are computed as always, since later layers may need them. Whether a model can be entered
so (its layers hand on hidden states and nothing else, and none looks at another one) is found out
by doing it and comparing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.stack import takes

Act = Callable[[tuple, dict[str, Any]], Any]


class Middle:
    """The place in front of layer `index` of a stack.

    Attributes:
        path: of the list of layers.
        layers: all of them.
        index: the first layer behind the place; the number of layers: behind all of them.
        wrap: puts hidden states into the form in which the layers say them.
    """

    def __init__(self, path: str, layers: nn.ModuleList, index: int) -> None:
        self.path, self.layers, self.index = path, layers, index
        self.wrap: Callable[[Tensor], Any] = lambda hidden: hidden

    @contextmanager
    def below(self) -> Iterator[list[Tensor]]:
        """Run the layers in front of the place only; yields a list to which every forward pass adds
        the hidden states there, (rows, tokens, width).
        """
        caught: list[Tensor] = []
        last = self.layers[self.index - 1]

        def catch(args: tuple, kwargs: dict[str, Any]) -> Any:
            said = last(*args, **kwargs)
            caught.append(_hidden(said))
            return said

        behind = dict.fromkeys(range(self.index, len(self.layers)), self._hand_on)
        with self._standing_in({self.index - 1: catch, **behind}):
            yield caught

    @contextmanager
    def above(self, states: Tensor) -> Iterator[None]:
        """Run the layers behind the place only, on these hidden states."""
        before = dict.fromkeys(range(self.index - 1), self._hand_on)
        with self._standing_in({**before, self.index - 1: lambda *_: self.wrap(states)}):
            yield

    def _hand_on(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.wrap(args[0] if args else kwargs["hidden_states"])

    @contextmanager
    def _standing_in(self, acts: Mapping[int, Act]) -> Iterator[None]:
        places = self.layers._modules
        before = dict(places)
        try:
            for index, act in acts.items():
                places[str(index)] = _stand_in(self.layers[index], act)
            yield
        finally:
            places.update(before)

    def fault(self, model: Any, inputs: Mapping[str, Any]) -> str | None:
        """Why `model`, which is in evaluation mode, cannot be entered here, tried on `inputs`; None
        where it can.
        """
        said: dict[int, Any] = {}

        def listen(index: int) -> Act:
            layer = self.layers[index]

            def act(args: tuple, kwargs: dict[str, Any]) -> Any:
                said[index] = layer(*args, **kwargs)
                return said[index]

            return act

        try:
            with self._standing_in({i: listen(i) for i in range(len(self.layers))}):
                wanted = body_output(model, inputs)
            if len(said) < len(self.layers) or (wrap := _form(said)) is None:
                return "its layers hand on more than hidden states, or are not called one by one"
            self.wrap = wrap
            states = _hidden(said[self.index - 1])
            with self.above(states):
                entered = body_output(model, inputs)
            with self.below() as caught:
                body_output(model, inputs)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            return next(iter(str(error).splitlines()), type(error).__name__)[:120]
        if not (torch.equal(entered, wanted) and torch.equal(caught[0], states)):
            return "what its layers say depends on more than the hidden states of the layer below"
        return None


def middle_of(model: nn.Module, adapters: list[Adapter]) -> tuple[Middle | None, str]:
    """The place in front of the lowest layer that these adapters touch, where there are layers
    below it; else None, and why.
    """
    found = _layers_of(model)
    if found is None:
        return None, "the model has no list of its layers, one behind another"
    path, layers = found
    lowest = len(layers)
    for adapter in adapters:
        for stage in adapter.stages:
            for place in stage.slots:
                index = _index_of(model, place, path, len(layers))
                if index == 0:
                    return None, f"the adapter {stage.name!r} acts at {place or 'the whole model'}"
                lowest = min(lowest, index)
    return Middle(path, layers, lowest), ""


def _layers_of(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The list of layers of a model with one stack; the outermost that is as long as its config
    says.
    """
    config = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder:
        return None
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return next(((name, m) for name, m in lists if len(m) == count), None)


def _index_of(model: Any, place: str, path: str, count: int) -> int:
    """The layer in which a place lies; 0 in front of and around the layers, `count` behind them."""
    if place.startswith(f"{path}."):
        return int(place.removeprefix(f"{path}.").split(".")[0])
    body = f"{getattr(model, 'base_model_prefix', '')}."
    behind = place and not f"{place}.".startswith(body) and path.startswith(body)
    return count if behind or "pooler" in place.split(".") else 0


def body_output(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states behind all layers (rows, tokens, width); nothing is cached."""
    body = model.base_model
    how = {"use_cache": False} if "use_cache" in takes(body) else {}
    return body(**inputs, **how).last_hidden_state


def _hidden(said: Any) -> Tensor:
    return said if isinstance(said, Tensor) else said[0]


def _form(said: Mapping[int, Any]) -> Callable[[Tensor], Any] | None:
    """How layers say their hidden states: bare, or first in a tuple of nothing else; None where
    they say more, or not all the same.
    """
    sizes = {len(s) if isinstance(s, tuple) else 0 for s in said.values()}
    rest = [part for s in said.values() if isinstance(s, tuple) for part in s[1:]]
    bare = all(
        isinstance(_hidden(s), Tensor) for s in said.values() if isinstance(s, tuple | Tensor)
    )
    if len(sizes) > 1 or not bare or any(part is not None for part in rest):
        return None
    size = sizes.pop()
    return (lambda h: (h, *[None] * (size - 1))) if size else (lambda h: h)


@functools.cache
def _standing_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose calls do something else; what the stack reads off a layer is still there."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_act"](args, kwargs)

    return type(f"StandIn{kind.__name__}", (kind,), {"__call__": call})


def _stand_in(layer: nn.Module, act: Act) -> nn.Module:
    cls = _standing_class(type(layer))
    made = cls.__new__(cls)
    made.__dict__.update(layer.__dict__, _act=act)
    return made

"""Which tensor of PEFT's adapter_model.safetensors belongs to which place of a model, and in which shape.

    linear, Conv1D, convolution    PATH.lora_A.weight, PATH.lora_B.weight
    embedding                      PATH.lora_embedding_A, PATH.lora_embedding_B
    bare parameter, experts        MODULE[.base_layer ...].lora_A.weight: the number of base_layer says which parameter of
                                   the module, counted from the last; A is (E r, I), B is (O, r E) with the expert fastest
    nn.MultiheadAttention          PATH.lora_* for in_proj_weight, PATH.base_layer.out_proj.lora_* for the output projection
    trained whole                  PATH.PARAMETER

All behind "base_model.model.". Legend: I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.attach.attach import Adapter, Places, seat
from lorica.attach.layers import describe
from lorica.attach.survey import clean
from lorica.errors import AdapterFileError
from lorica.files.peft_config import HEADS_OF_PEFT, PeftConfig
from lorica.methods.copy import Copy
from lorica.methods.lora import LoRA
from lorica.methods.method import Layer, Method, Tensors

PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "a bias on lora_B",
    "token_adapter": "trainable tokens",
    "lora_diag": "KaSA",
    "lora_E": "AdaLoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_up": "kohya's layout",
    ".default.": "an adapter's name inside the key: a state_dict of the running model, not PEFT's layout",
}
_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)

Shape = tuple[int, ...]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the path that files use, also under its second name."""
    return {clean(path): m for path, m in model.named_modules(remove_duplicate=False)}


@dataclass(frozen=True)
class Spot:
    """One place and how PEFT writes it.

    Attributes:
        path: the key of `Adapter.slots`.
        core: path of the module in the base.
        parameter: the parameter where no layer is called, else None.
        layer: what is known of the layer.
        depth: number of ".base_layer" after the core in the key.
        matched: the path that PEFT matches patterns against.
    """

    path: str
    core: str
    parameter: str | None
    layer: Layer
    depth: int = 0
    matched: str = ""

    @property
    def is_bare(self) -> bool:
        """Whether PEFT names the parameter (target_parameters) and not the module."""
        return self.matched != self.core

    def key(self, factor: str) -> str:
        """The key of factor "A" or "B"."""
        head = f"{PREFIX}{self.core}{'.base_layer' * self.depth}"
        if self.layer.kind == "embedding":
            return f"{head}.lora_embedding_{factor}"
        return f"{head}.lora_{factor}.weight"

    def to_file(self, tensors: Tensors) -> dict[str, Tensor]:
        """Our factors in PEFT's shapes."""
        A, B = tensors["A"], tensors["B"]
        if self.layer.kind == "experts":
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # (E R, I), (O, R E)
        return {self.key("A"): A, self.key("B"): B}

    def from_file(self, A: Tensor, B: Tensor) -> Tensors:
        """PEFT's factors in our shapes."""
        if self.layer.kind == "experts":
            experts = self.layer.num_experts
            A = A.view(experts, -1, A.shape[-1])
            B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
        return {"A": A.contiguous(), "B": B.contiguous()}

    def rank(self, shape_A: Shape) -> int:
        return shape_A[0] // max(self.layer.num_experts, 1) if shape_A else 0

    def shapes(self, r: int) -> tuple[Shape, Shape]:
        """What PEFT's factors of rank `r` must look like here."""
        layer, experts = self.layer, max(self.layer.num_experts, 1)
        kernel, groups = layer.kernel_size, layer.geometry.get("groups", 1)
        shape_B = (layer.out_features, r * experts // groups, *(1 for _ in kernel))
        return (r * experts, layer.in_features, *kernel), shape_B


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Where every tensor of a file goes, and what is wrong with the rest.

    Attributes:
        places: for `attach_tensors`, in the order in which `attach` makes them.
        factors: path -> (spot, key of A, key of B).
        copies: path -> parameter -> key.
        repeated: key -> parameter of the base that the file merely repeats, to be compared.
        seen: what the file speaks of, soundly or not: paths of modules and parameters.
        unexpected, missing, misshapen: problems, a sentence each.
    """

    places: Places = field(default_factory=dict)
    factors: dict[str, tuple[Spot, str, str]] = field(default_factory=dict)
    copies: dict[str, dict[str, str]] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)


def plan(model: nn.Module, shapes: Mapping[str, Shape], config: PeftConfig) -> Plan:
    """Find the place of every tensor, by names and shapes alone; no data is read."""
    modules = modules_of(model)
    found = Plan()
    pairs: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        stem, factor = _split(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX):
            found.unexpected.append(f"{key}: it does not start with {PREFIX!r}")
        elif factor:
            pairs.setdefault(stem, {})[factor] = key
        else:
            _plan_plain(found, modules, stem, key, shape, config)
    for stem, keys in pairs.items():
        _plan_pair(found, modules, stem, keys, shapes, config)
    _plan_missing(found, model, modules, config)
    _refuse_second_names(found)
    order = {path: i for i, path in enumerate(modules)}
    found.places = dict(sorted(found.places.items(), key=lambda item: _rank(item, order)))
    return found


def _rank(
    item: tuple[str, tuple[nn.Module, str | None, Method]], order: Mapping[str, int]
) -> tuple[int, int]:
    """Layers first, then bare parameters, then copies; each in the order of the model."""
    path, (_, parameter, method) = item
    group = 2 if isinstance(method, Copy) else int(parameter not in (None, "weight"))
    return group, order[path if path in order else path.rpartition(".")[0]]


def _split(key: str) -> tuple[str, str | None]:
    for suffix, factor in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), factor
    return key, None


def _plan_plain(
    found: Plan,
    modules: Mapping[str, nn.Module],
    name: str,
    key: str,
    shape: Shape,
    config: PeftConfig,
) -> None:
    """A tensor that is no factor: a parameter trained whole, or a repeated one of the base."""
    path, _, parameter = name.rpartition(".")
    repeats = path.endswith(".base_layer")
    path = path.removesuffix(".base_layer")
    own = modules[path]._parameters.get(parameter) if path in modules else None
    foreign = _foreign(name)
    found.seen.add(f"{path}.{parameter}")
    if own is None or foreign:
        found.unexpected.append(f"{key}: {foreign or 'the base has no such parameter'}")
    elif tuple(own.shape) != shape:
        resized = own.dim() == len(shape) == 2 and own.shape[1] == shape[1]
        hint = " (a vocabulary of another size? resize the base first)" if resized else ""
        found.misshapen.append(f"{key}: {shape}, but the base has {tuple(own.shape)}{hint}")
    elif repeats:
        found.repeated[key] = own
    elif not config.may_save_whole(path):
        found.unexpected.append(f"{key}: it lies in none of modules_to_save")
    else:
        found.copies.setdefault(path, {})[parameter] = key
        found.places[path] = modules[path], None, Copy()


def _plan_pair(
    found: Plan,
    modules: Mapping[str, nn.Module],
    stem: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, Shape],
    config: PeftConfig,
) -> None:
    """The two factors of one place."""
    spot = locate(modules, stem, config.target_parameters)
    if isinstance(spot, str):
        found.unexpected += [f"{key}: {spot}" for key in keys.values()]
        return
    found.seen.add(spot.matched)
    wrong = [key for factor, key in keys.items() if key != spot.key(factor)]
    lacking = [spot.key(f) for f in "AB" if spot.key(f) not in keys.values()]
    if wrong or lacking:
        found.unexpected += [f"{key}: not the name for a layer of this kind" for key in wrong]
        found.missing += lacking
        return
    selected = config.selects_parameter(spot.matched) if spot.is_bare else config.selects(spot.matched)
    shape_A, shape_B = shapes[keys["A"]], shapes[keys["B"]]
    r, expected = spot.rank(shape_A), config.rank_at(spot.matched)
    if selected is False:
        found.unexpected.append(f"{keys['A']} (and B): the config does not name this place")
    elif r < 1 or (shape_A, shape_B) != spot.shapes(r):
        want_A, want_B = spot.shapes(expected)
        found.misshapen.append(
            f"{stem}: A {shape_A} and B {shape_B}, but the base needs {want_A} and {want_B}"
        )
    elif r != expected:
        found.misshapen.append(f"{stem}: rank {r}, but the config says {expected}")
    else:
        found.factors[spot.path] = spot, keys["A"], keys["B"]
        method = config.method_at(spot.matched)
        found.places[spot.path] = modules[spot.core], spot.parameter, method


def _refuse_second_names(found: Plan) -> None:
    """A layer that the model holds under two names can carry the tensors of one of them only."""
    first: dict[tuple[int, str | None], str] = {}
    for path, (module, parameter, _) in found.places.items():
        known = first.setdefault((id(module), parameter), path)
        if known != path:
            found.unexpected.append(f"{path}: the same layer as {known}, which has tensors already")


def _foreign(name: str) -> str | None:
    """Which other method or layout a key is of, as far as its name tells."""
    return next((text for mark, text in _FOREIGN.items() if mark in name), None)


def locate(
    modules: Mapping[str, nn.Module], stem: str, target_parameters: Iterable[str] = ()
) -> Spot | str:
    """The place that a key without prefix and suffix names, or why there is none."""
    core, depth = stem, 0
    while core.endswith(".base_layer") and core not in modules:
        core, depth = core.removesuffix(".base_layer"), depth + 1
    if core not in modules:
        core = _without_wrappers(core, modules)
    if core not in modules:
        return _foreign(stem) or "the base has no such module"
    module = modules[core]
    named = [
        name
        for name in module._parameters
        if any(f"{core}.{name}" == t or f"{core}.{name}".endswith(f".{t}") for t in target_parameters)
    ]
    if named:
        if depth >= len(named):
            return f"nested {depth} deep, but only {len(named)} parameters are named there"
        return _bare_spot(modules, core, named[len(named) - 1 - depth], depth)
    if depth:
        return "a nested key, but target_parameters names no parameter there"
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return "the attention has separate projections, which PEFT's layout cannot name"
        path = f"{core}.in_proj_weight"
        return Spot(path, core, "in_proj_weight", describe(module, "in_proj_weight"), 0, core)
    if not isinstance(module, _LAYERS):
        return f"{type(module).__name__} is no layer that LoRA adapts"
    path, parameter = seat(modules, core)
    return _in_attention(modules, Spot(path, core, parameter, describe(module), 0, core))


def _without_wrappers(core: str, modules: Mapping[str, nn.Module]) -> str:
    """The core without the ".base_layer" that a wrapped module above it left in its path."""
    found: list[str] = []
    for part in core.split("."):
        if part != "base_layer" or ".".join([*found, part]) in modules:
            found.append(part)
    return ".".join(found)


def _in_attention(modules: Mapping[str, nn.Module], spot: Spot) -> Spot:
    """The output projection of nn.MultiheadAttention is written inside PEFT's wrapper of the attention."""
    parent, _, last = spot.core.rpartition(".")
    if not isinstance(modules.get(parent), nn.MultiheadAttention):
        return spot
    return _AttentionOutput(spot.path, spot.core, spot.parameter, spot.layer, 0, parent)


@dataclass(frozen=True)
class _AttentionOutput(Spot):
    """The output projection in PEFT's wrapper of nn.MultiheadAttention.

    PEFT up to 0.21.2 adds its product twice there: `lora.MultiheadAttention.merge` writes W + s B A and then calls
    `out_proj.merge()`. An adapter trained in PEFT has learnt with that, and ours must mean the same in PEFT, so B
    is halved in the file and doubled on reading, which costs no bit.
    """

    @property
    def is_bare(self) -> bool:
        return False

    def key(self, factor: str) -> str:
        parent, _, last = self.core.rpartition(".")
        return f"{PREFIX}{parent}.base_layer.{last}.lora_{factor}.weight"

    def to_file(self, tensors: Tensors) -> dict[str, Tensor]:
        return super().to_file({"A": tensors["A"], "B": tensors["B"] * 0.5})

    def from_file(self, A: Tensor, B: Tensor) -> Tensors:
        return super().from_file(A, B * 2)


def _bare_spot(
    modules: Mapping[str, nn.Module], core: str, parameter: str, depth: int
) -> Spot | str:
    module = modules[core]
    if isinstance(module, Conv1D):
        return "target_parameters of a Conv1D are not read"
    matched = f"{core}.{parameter}"
    if isinstance(module, _LAYERS) and parameter == "weight":
        path, own = seat(modules, core)
        return Spot(path, core, own, describe(module), depth, matched)
    if module._parameters[parameter].dim() not in (2, 3):  # pyright: ignore[reportOptionalMemberAccess]
        return "only parameters of two or three dimensions can be adapted"
    return Spot(matched, core, parameter, describe(module, parameter), depth, matched)


def _plan_missing(
    found: Plan, model: nn.Module, modules: Mapping[str, nn.Module], config: PeftConfig
) -> None:
    """What the config promises and the file does not hold."""
    for raw_path, module in model.named_modules():
        path = clean(raw_path)
        if path in found.seen or not isinstance(module, (*_LAYERS, nn.MultiheadAttention)):
            continue
        if config.selects(path) and not _below_attention(modules, path):
            found.missing.append(f"{PREFIX}{path}: its two factors")
    for raw_path, _ in model.named_parameters():
        path = clean(raw_path)
        if path not in found.seen and config.selects_parameter(path):
            found.missing.append(f"{path}: its two factors")
        if path not in found.seen and config.saves_whole(path.rpartition(".")[0]):
            found.missing.append(f"{PREFIX}{path}")
    ignorable = {name for names in HEADS_OF_PEFT.values() for name in names}
    for name in set(config.modules_to_save) - ignorable:
        if not any(path == name or path.endswith(f".{name}") for path in modules):
            found.missing.append(f"modules_to_save names {name!r}, which the base does not have")


# --- writing ------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """An adapter in PEFT's layout, and what its config needs to say."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, tuple[int, float]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, float]] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Places that Lorica reads back and PEFT does not."""
    has_conv1d: bool = False


def to_peft(adapter: Adapter) -> Written:
    """The tensors of an adapter under PEFT's keys.

    Raises:
        AdapterFileError: it sits on the model itself, which has no path.
    """
    modules = modules_of(adapter.model)
    found = Written()
    bare = _bare_parameters(adapter, modules)
    for path, slot in adapter.slots.items():
        if isinstance(slot.method, Copy):
            found.tensors.update({f"{PREFIX}{path}.{n}": _plain(t) for n, t in slot.tensors.items()})
            continue
        core, parameter = _core(path, modules)
        if not core or not isinstance(slot.method, LoRA):
            raise AdapterFileError(
                f"{path or 'the model itself'}: {slot.method.kind} here has no name in PEFT's layout",
                mend="put the model inside another module" if not core else None,
            )
        names = bare.get(core, [])
        spot = _spot_of(modules, core, parameter, names)
        if spot.is_bare:
            found.parameters[spot.matched] = slot.method.r, slot.method.lora_alpha
            if spot.layer.kind != "experts":
                found.unreadable += [path] if _below_attention(modules, core) else []
        else:
            found.modules[spot.matched] = slot.method.r, slot.method.lora_alpha
        found.has_conv1d |= isinstance(modules[core], Conv1D)
        found.tensors.update(
            spot.to_file({name: _plain(tensor) for name, tensor in slot.tensors.items()})
        )
    found.whole = _whole(adapter, modules)
    found.unreadable += [
        path
        for path in found.modules
        if any(path.endswith(name) and not f".{path}".endswith(f".{name}") for name in found.whole)
    ]
    _fill_attention(found, modules)
    return found


def _core(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str | None]:
    if path in modules:
        return path, None
    core, _, parameter = path.rpartition(".")
    return core, parameter


def _below_attention(modules: Mapping[str, nn.Module], core: str) -> bool:
    return isinstance(modules.get(core.rpartition(".")[0]), nn.MultiheadAttention)


def _bare_parameters(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Module -> its parameters that must be named one by one, in the order in which PEFT wraps them."""
    names: dict[str, list[str]] = {}
    for path, slot in adapter.slots.items():
        core, parameter = _core(path, modules)
        if parameter is None or isinstance(slot.method, Copy):
            continue
        module = modules[core]
        attention = core if isinstance(module, nn.MultiheadAttention) else core.rpartition(".")[0]
        in_attention = isinstance(modules.get(attention), nn.MultiheadAttention)
        plain_layer = isinstance(module, _LAYERS) and parameter == "weight"
        if in_attention and not _fits_wrapper(adapter, attention, modules):
            names.setdefault(core, []).append(parameter)
        elif not in_attention and not plain_layer:
            names.setdefault(core, []).append(parameter)
    return {
        core: [name for name in modules[core]._parameters if name in found]
        for core, found in names.items()
    }


def _fits_wrapper(adapter: Adapter, attention: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT's one wrapper can say what sits on this nn.MultiheadAttention."""
    if modules[attention].in_proj_weight is None:
        return False
    paths = (f"{attention}.in_proj_weight", f"{attention}.out_proj.weight")
    methods = [adapter.slots[path].method for path in paths if path in adapter.slots]
    return len({(m.r, m.lora_alpha) for m in methods if isinstance(m, LoRA)}) == 1


def _spot_of(
    modules: Mapping[str, nn.Module], core: str, parameter: str | None, names: list[str]
) -> Spot:
    if names:
        depth = len(names) - 1 - names.index(parameter or "")
        spot = _bare_spot(modules, core, parameter or "", depth)
    else:
        spot = locate(modules, core)
    if isinstance(spot, str):
        raise AdapterFileError(f"{core} cannot be written: {spot}")
    return spot


def _fill_attention(found: Written, modules: Mapping[str, nn.Module]) -> None:
    """PEFT's wrapper of nn.MultiheadAttention has factors for both projections: zeros for one left out."""
    for path, (r, _) in list(found.modules.items()):
        if not isinstance(modules[path], nn.MultiheadAttention):
            continue
        for stem in (path, f"{path}.out_proj"):
            spot = locate(modules, stem)
            assert isinstance(spot, Spot)
            shapes = dict(zip("AB", spot.shapes(r), strict=True))
            for factor, shape in shapes.items():
                found.tensors.setdefault(spot.key(factor), torch.zeros(shape))


def _whole(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names for modules_to_save: the settings' own where they say it, else the full paths."""
    copied = [path for path, slot in adapter.slots.items() if isinstance(slot.method, Copy)]
    names = [n for n in getattr(adapter.method, "modules_to_save", ()) if n]
    named = [p for p in copied if any(f".{p}.".find(f".{name}.") >= 0 for name in names)]
    return sorted({*names, *(path for path in copied if path not in named)}) if copied else []


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.float64 else tensor.float()

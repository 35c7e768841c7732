"""The names of PEFT's adapter_model.safetensors: where a tensor belongs, and in which shape.

    linear, Conv1D, convolution   PATH.lora_A.weight, PATH.lora_B.weight
    embedding                     PATH.lora_embedding_A, PATH.lora_embedding_B
    bare parameter, experts       MODULE[.base_layer ...].lora_A.weight, likewise B
    nn.MultiheadAttention         PATH.lora_A.weight for in_proj_weight, and
                                  PATH.base_layer.out_proj.lora_A.weight; likewise B
    DoRA besides                  PATH.lora_magnitude_vector
    trained whole                 PATH.PARAMETER
    rows of some tokens           PATH.token_adapter.trainable_tokens_delta

All behind "base_model.model.". Of a bare parameter the key does not say the name: the number of
".base_layer" counts the parameters of the module from the last one. For experts A is (E R, I), and
B is (O, R E) with the expert fastest.

Legend: I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.attach.layers import describe
from lorica.attach.places import seat
from lorica.attach.survey import clean
from lorica.methods.method import Layer, Tensors

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
"""Behind an embedding's path: the rows of its trainable tokens, in the order of the config."""
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "m",
}
_FOREIGN = {
    "lora_B.bias": "a bias on lora_B",
    "token_adapter": "trainable tokens",
    "lora_diag": "KaSA",
    "lora_E": "AdaLoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_up": "kohya's layout",
    ".default.": "an adapter's name inside the key, as in the state_dict of a running model",
}
LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)

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
        """The key of factor "A" or "B", or of DoRA's "m"."""
        head = f"{PREFIX}{self.core}{'.base_layer' * self.depth}"
        if factor == "m":
            return f"{head}.lora_magnitude_vector"
        if self.layer.kind == "embedding":
            return f"{head}.lora_embedding_{factor}"
        return f"{head}.lora_{factor}.weight"

    def to_file(self, tensors: Tensors) -> dict[str, Tensor]:
        """Our factors in PEFT's shapes."""
        A, B = tensors["A"], tensors["B"]
        if self.layer.kind == "experts":
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # (E R, I), (O, R E)
        found = {self.key("A"): A, self.key("B"): B}
        if "m" in tensors:
            found[self.key("m")] = tensors["m"].view(self.magnitude_shape)
        return found

    @property
    def magnitude_shape(self) -> Shape:
        """What PEFT's magnitudes look like here; of convolutions as they meet activations."""
        kernel = self.layer.kernel_size
        width = self.layer.out_features
        return (1, width, *(1 for _ in kernel)) if kernel else (width,)

    def from_file(self, A: Tensor, B: Tensor, m: Tensor | None = None) -> Tensors:
        """PEFT's factors in our shapes."""
        if self.layer.kind == "experts":
            experts = self.layer.num_experts
            A = A.view(experts, -1, A.shape[-1])
            B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
        found = {"A": A.contiguous(), "B": B.contiguous()}
        return found if m is None else {**found, "m": m.reshape(-1)}

    def rank(self, shape_A: Shape) -> int:
        return shape_A[0] // max(self.layer.num_experts, 1) if shape_A else 0

    def shapes(self, r: int) -> tuple[Shape, Shape]:
        """What PEFT's factors of rank `r` must look like here."""
        layer, experts = self.layer, max(self.layer.num_experts, 1)
        kernel, groups = layer.kernel_size, layer.geometry.get("groups", 1)
        shape_B = (layer.out_features, r * experts // groups, *(1 for _ in kernel))
        return (r * experts, layer.in_features, *kernel), shape_B


def split_key(key: str) -> tuple[str, str | None]:
    """The key without its suffix, and which factor it is; None for what is no factor."""
    for suffix, factor in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), factor
    return key, None


def below_attention(modules: Mapping[str, nn.Module], core: str) -> bool:
    """Whether the module at `core` is a part of an nn.MultiheadAttention."""
    return isinstance(modules.get(core.rpartition(".")[0]), nn.MultiheadAttention)


def foreign(name: str) -> str | None:
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
        return foreign(stem) or "the base has no such module"
    module = modules[core]
    named = [
        name
        for name in module._parameters
        if any(
            f"{core}.{name}" == t or f"{core}.{name}".endswith(f".{t}") for t in target_parameters
        )
    ]
    if named:
        if depth >= len(named):
            return f"nested {depth} deep, but only {len(named)} parameters are named there"
        return bare_spot(modules, core, named[len(named) - 1 - depth], depth)
    if depth:
        return "a nested key, but target_parameters names no parameter there"
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return "the attention has separate projections, which PEFT's layout cannot name"
        path = f"{core}.in_proj_weight"
        return Spot(path, core, "in_proj_weight", describe(module, "in_proj_weight"), 0, core)
    if not isinstance(module, LAYERS):
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
    """The output projection of nn.MultiheadAttention is written inside PEFT's wrapper of the
    attention.
    """
    if not below_attention(modules, spot.core):
        return spot
    parent = spot.core.rpartition(".")[0]
    return _AttentionOutput(spot.path, spot.core, spot.parameter, spot.layer, 0, parent)


@dataclass(frozen=True)
class _AttentionOutput(Spot):
    """The output projection in PEFT's wrapper of nn.MultiheadAttention.

    PEFT up to 0.21.2 adds its product twice there: `lora.MultiheadAttention.merge` writes W + s B A
    and then calls `out_proj.merge()`. An adapter trained in PEFT has learnt with that, and ours
    must mean the same in PEFT, so B is halved in the file and doubled on reading, which costs no
    bit.
    """

    @property
    def is_bare(self) -> bool:
        return False

    def key(self, factor: str) -> str:
        parent, _, last = self.core.rpartition(".")
        return f"{PREFIX}{parent}.base_layer.{last}.lora_{factor}.weight"

    def to_file(self, tensors: Tensors) -> dict[str, Tensor]:
        return super().to_file({"A": tensors["A"], "B": tensors["B"] * 0.5})

    def from_file(self, A: Tensor, B: Tensor, m: Tensor | None = None) -> Tensors:
        return super().from_file(A, B * 2, m)


def bare_spot(
    modules: Mapping[str, nn.Module], core: str, parameter: str, depth: int
) -> Spot | str:
    """The place of a parameter that is named itself, or why it cannot be one."""
    module = modules[core]
    if isinstance(module, Conv1D):
        return "target_parameters of a Conv1D are not read"
    matched = f"{core}.{parameter}"
    if isinstance(module, LAYERS) and parameter == "weight":
        path, own = seat(modules, core)
        return Spot(path, core, own, describe(module), depth, matched)
    if module._parameters[parameter].dim() not in (2, 3):  # pyright: ignore[reportOptionalMemberAccess]
        return "only parameters of two or three dimensions can be adapted"
    return Spot(matched, core, parameter, describe(module, parameter), depth, matched)

"""What a model is made of: every place that an adapter could take, and what part it plays.

The part is read off the structure, not off a list of models: the names and classes of the modules
above a layer, and whether it lies in one of the repeated blocks (its path holds a number). Weights
are not looked at, so a model on the meta device will do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorica.base.ends import end_layer
from lorica.errors import TargetError

Kind = Literal["linear", "embedding", "convolution", "experts", "packed", "other"]
Role = Literal[
    "attention", "mlp", "mixer", "experts", "embedding", "convolution", "outside", "head", "router"
]

LINEAR = (nn.Linear, Conv1D)
CONVOLUTION = (nn.Conv1d, nn.Conv2d)
SUPPORTED = (*LINEAR, nn.Embedding, *CONVOLUTION)
SUPPORTED_NAMES = "Linear, Conv1D (GPT-2's), Embedding, Conv1d, Conv2d, or 3-D expert weights"

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_EXPERTS = re.compile(r"Experts(MLP)?$|ParallelExperts|GroupedExperts")
# Of nn.MultiheadAttention, whose projections are bare parameters.
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_ODD_LINEAR = re.compile(r"Grouped|Decoupled|Router")  # forward is not x W^T + b
_FUSED = {"query_key_value", "qkv_proj", "qkv", "wqkv", "c_attn", "in_proj_qkvz", "in_proj_qkv"}
_WORDS: dict[Role, re.Pattern[str]] = {
    "attention": re.compile(r"attention|attn"),
    "mlp": re.compile(r"mlp|feedforward|feed_forward|ffn|layerff$|densereludense"),
    "mixer": re.compile(r"mamba|mixer|ssm|lstm|recurrent|deltanet|shortconv|rwkv"),
}
_COVER = re.compile(r"(layer|block)s?$|pool")  # names of things that hold attention and more
# Parts of a model after or beside its body. Only looked for in front of the first number of a path.
_HEADS = {"head", "heads", "score", "classifier", "classifiers", "pooler", "predictions", "cls"}
_HEADS |= {"predictor", "qa", "logits", "vocab", "summary", "relationship"}
_HEAD_NAMES = {"embed_out", "proj_out", "output_projection", "lm_loss", "projector", "pred_layer"}
_HEAD_NAMES |= {"visual_projection", "text_projection"}


@dataclass(frozen=True, eq=False)
class Place:
    """Somewhere that an adapter could sit.

    Attributes:
        path: the module's path, or that of a parameter which no supported layer owns.
        module: the module, or the one that owns the parameter.
        parameter: the parameter's name in its module; None where the module itself is the place.
        kind: what it computes.
        role: its part in the model; "outside" is a linear layer outside the repeated blocks.
        layer: the number of its block: the first number in its path; None outside the blocks.
        also: further paths of the same module.
        shared: paths of other modules that hold the same Parameter.
        refusal: why no adapter can sit here; None where one can.
    """

    path: str
    module: nn.Module
    parameter: str | None
    kind: Kind
    role: Role
    layer: int | None
    also: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, (out, in); read off the attributes, since quantizers pack weights."""
        module = self.module
        if self.parameter is not None:
            return tuple(module._parameters[self.parameter].shape)  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        if isinstance(module, Conv1D):
            return module.nf, module.nx
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        if isinstance(module, CONVOLUTION):
            return module.out_channels, module.in_channels // module.groups, *module.kernel_size
        return ()


@dataclass(frozen=True, eq=False)
class Survey:
    """All places of a model, and the names of everything else.

    Attributes:
        places: by path, in the order of the model; modules of supported classes, 3-D expert weights
            and the packed projections of `nn.MultiheadAttention`.
        bare: other parameters of at least 2 dimensions that no supported layer owns, by path. An
            adapter takes them when they are named (routers, state matrices), never by itself.
        modules: every module by path, also under its second name.
        model_type: `config.model_type`, or None.
    """

    places: dict[str, Place]
    bare: dict[str, Place]
    modules: dict[str, nn.Module]
    model_type: str | None

    def suffixes(self) -> Counter[str]:
        """How often each last name occurs among the places; a number keeps the name before it."""
        return Counter(suffix_of(path) for path in self.places)


def suffix_of(path: str) -> str:
    """`a.b.q_proj` -> `q_proj`, `a.to_out.0` -> `to_out.0`, `a.gate.weight` -> `gate.weight`."""
    parts = path.split(".")
    start = len(parts) - 1
    while start > 0 and (parts[start].isdecimal() or parts[start] == "weight"):
        start -= 1
    return ".".join(parts[start:])


def ends(path: str, name: str) -> bool:
    """PEFT's rule: `name` is the path, or its end after a dot."""
    return path == name or path.endswith(f".{name}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`.

    Raises:
        TargetError: the model is wrapped by something that adapters cannot pass through.
    """
    while (inner := model._modules.get("_orig_mod")) is not None:
        model = inner
    name = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TargetError(
            f"the model is wrapped in {name}, which would not see the adapter's tensors",
            mend="attach to the model inside (model.module); do not wrap a model with adapters",
        )
    if getattr(model, "peft_config", None):
        raise TargetError(
            "the model carries adapters of PEFT already",
            mend="merge or unload them first (merge_and_unload(), unload())",
        )
    return model


def survey(model: nn.Module) -> Survey:
    """Look at a model. See `Survey`. Raises TargetError as `unwrap` does."""
    model = unwrap(model)
    modules = {clean(path): m for path, m in model.named_modules(remove_duplicate=False)}
    first: dict[int, str] = {}
    also: dict[str, list[str]] = {}
    for path, module in modules.items():
        if (known := first.setdefault(id(module), path)) != path:
            also.setdefault(known, []).append(path)
    owners: dict[int, list[str]] = {}
    for path in first.values():
        for parameter in modules[path]._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    head = end_layer(model)
    places: dict[str, Place] = {}
    bare: dict[str, Place] = {}
    for path in filter(None, first.values()):  # the root has no name to sit at
        for place in _places(path, modules, head):
            shared = _sharers(place, owners)
            place = replace(
                place,
                also=tuple(also.get(path, ())),
                shared=shared,
                refusal=_refusal(place, shared, modules),
            )
            (bare if place.kind == "other" else places)[place.path] = place
    return Survey(places, bare, modules, model_type(model))


def model_type(model: nn.Module) -> str | None:
    """`config.model_type` of the language model within, where there is one, else of the model."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, Mapping):
        return None
    for part in ("text_config", "llm_config"):
        inner = getattr(config, part, None)
        if inner is not None and has_language_model(model):
            config = inner
            break
    family = getattr(config, "model_type", None)
    return family if isinstance(family, str) else None


def has_language_model(model: nn.Module) -> bool:
    """Whether a language model sits beside other towers (vision, audio) in this model."""
    return any(path.rpartition(".")[2] == "language_model" for path, _ in model.named_modules())


def clean(path: str) -> str:
    """A path without the names that torch.compile, FSDP and checkpoint wrappers insert."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _sharers(place: Place, owners: dict[int, list[str]]) -> tuple[str, ...]:
    parameter = place.module._parameters.get(place.parameter or "weight")
    here = place.path.rpartition(".")[0] if place.parameter else place.path
    return tuple(path for path in owners.get(id(parameter), ()) if path != here)


def _refusal(place: Place, shared: tuple[str, ...], modules: dict[str, nn.Module]) -> str | None:
    """Why a layer of a supported class cannot carry an adapter after all."""
    if place.parameter is not None:
        return None
    parent, _, last = place.path.rpartition(".")
    inside = [path for path in shared if path.startswith(f"{parent}." if parent else "")]
    called = [path for path in inside if isinstance(modules[path], nn.Embedding)]
    if isinstance(place.module, nn.Embedding) and last == "shared" and called:  # T5, BART and kin
        return f"it is never called: {' and '.join(called)} look the tokens up, name those"
    kind = getattr(type(place.module), "_lorica_base", type(place.module))  # already a site
    own = kind.forward not in (nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward)
    if isinstance(place.module, LINEAR):
        own = bool(_ODD_LINEAR.search(kind.__name__))
    elif isinstance(place.module, nn.Embedding) and hasattr(place.module, "embed_scale"):
        own = False
    return f"a {kind.__name__} does more than the class it is made from" if own else None


def _places(path: str, modules: dict[str, nn.Module], head: nn.Module | None) -> Iterator[Place]:
    """The places of one module; bare parameters are of kind "other"."""
    module = modules[path]
    layer = layer_number(path)
    if isinstance(module, SUPPORTED):
        role = "head" if module is head else _role(path, modules)
        yield Place(path, module, None, _kind(module), role, layer)
        return
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        if "parametrizations" in path:  # the weight of a supported layer, under another name
            continue
        full = f"{path}.{name}" if path else name
        if parameter.dim() == 3 and _EXPERTS.search(type(module).__name__) and "bias" not in name:
            yield Place(full, module, name, "experts", "experts", layer)
        elif isinstance(module, nn.MultiheadAttention) and name in _PACKED:
            role = "head" if _in_head(path) else "attention"
            yield Place(full, module, name, "packed", role, layer)
        else:
            role = "router" if _is_router(path, modules) else "outside"
            yield Place(full, module, name, "other", role, layer)


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, LINEAR):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else "convolution"


def layer_number(path: str) -> int | None:
    """The number of the block that a path lies in: the first number in it."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def _role(path: str, modules: dict[str, nn.Module]) -> Role:
    module, parts = modules[path], path.split(".")
    if isinstance(module, nn.Embedding):
        return "embedding"
    if _is_router(path, modules):
        return "router"
    if _in_head(path):
        return "head"
    if isinstance(module, CONVOLUTION):
        return "convolution"
    if "experts" in parts[:-1]:
        return "experts"
    for depth in range(len(parts) - 1, 0, -1):
        above = modules.get(".".join(parts[:depth]))
        if verdict := _verdict(type(above).__name__, parts[depth - 1]):
            return verdict
    if parts[-1].lower() in _FUSED:
        return "attention"
    numbered = any(part.isdecimal() for part in parts)
    has_blocks = numbered or not any(layer_number(p) is not None for p in modules)
    return "mlp" if has_blocks else "outside"


def _verdict(class_name: str, name: str) -> Role | None:
    """What the class and the name of a module above a layer say about it."""
    texts = [text for text in (class_name.lower(), name.lower()) if not _COVER.search(text)]
    for role, words in _WORDS.items():
        if any(words.search(text) for text in texts):
            return role
    return None


def _is_router(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer decides who sees a token: routers, and the indexers of sparse attention."""
    parts = path.split(".")
    if any(word in part for part in parts[-3:] for word in ("router", "indexer")):
        return True
    if re.search(r"Router|TopKGate|MoEGate|MoeGate", type(modules[path]).__name__):
        return True
    if parts[-1] in ("shared_expert_gate", "shared_experts_gate"):
        return True
    if "gate" not in parts[-2:]:
        return False
    above = parts[: -1 if parts[-1] == "gate" else -2]
    return ".".join([*above, "experts"]) in modules


def _in_head(path: str) -> bool:
    """Whether a name in front of the first number says that this is not the body of the model."""
    for part in path.split("."):
        if part.isdecimal():
            return False
        if part in _HEAD_NAMES or _HEADS & set(part.split("_")):
            return True
    return False

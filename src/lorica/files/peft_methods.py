"""The methods beside LoRA in PEFT's words: AdaLoRA, VeRA, LoHa, LoKr, HiRA, IA3, RoAd.

What differs between their layouts stands in `KINDS`: layers, names of settings, names and shapes of
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.files import peft_ranks
from lorica.methods.adalora import AdaLoRA
from lorica.methods.hira import HiRA
from lorica.methods.ia3 import IA3
from lorica.methods.loha import LoHa
from lorica.methods.lokr import LoKr
from lorica.methods.method import Layer, Method
from lorica.methods.road import RoAd
from lorica.methods.vera import VeRA


@dataclass(frozen=True)
class Kind:
    """One method in PEFT's words.

    Attributes:
        method: ours.
        layers: the classes of layers on which PEFT has it.
        settings: our name of a setting -> PEFT's.
        neutral: keys of PEFT that Lorica does not have, at the value that changes nothing.
        fixed: keys that are written besides.
        prefix: in front of our name of a tensor, in the key.
        has_exclusion: whether PEFT's config knows exclude_modules.
        has_groups: whether it has the method on grouped convolutions.
    """

    method: type
    layers: tuple[type, ...]
    settings: Mapping[str, str]
    neutral: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    has_exclusion: bool = True
    has_groups: bool = True

    def sits_on(self, module: nn.Module | None) -> bool:
        """Whether PEFT has it on a layer."""
        return isinstance(module, self.layers) and (
            self.has_groups or getattr(module, "groups", 1) == 1
        )


_LYCORIS = {
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    "use_effective_conv2d": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_LAYERS_CHOSEN = {"layers_to_transform": None, "layers_pattern": None}
_PLAIN, _CONVOLVED = (nn.Linear, Conv1D), (nn.Linear, nn.Conv1d, nn.Conv2d)

KINDS: dict[str, Kind] = {
    "VERA": Kind(
        VeRA,
        _PLAIN,
        {key: key for key in ("r", "vera_dropout", "d_initial", "projection_prng_key")},
        {"bias": "none"},
        {"init_weights": True, "save_projection": True, **_LAYERS_CHOSEN},
        "vera_lambda_",
        has_exclusion=False,
    ),
    "LOHA": Kind(
        LoHa,
        _CONVOLVED,
        {"r": "r", "lora_alpha": "alpha"},
        _LYCORIS,
        {"init_weights": True, **_LAYERS_CHOSEN},
        "hada_",
    ),
    "LOKR": Kind(
        LoKr,
        _CONVOLVED,
        {
            "r": "r",
            "lora_alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        _LYCORIS,
        {"init_weights": True, "rank_dropout_scale": False, **_LAYERS_CHOSEN},
        "lokr_",
    ),
    "HIRA": Kind(
        HiRA,
        (*_PLAIN, nn.Conv1d, nn.Conv2d, nn.Embedding),
        {"r": "r", "hira_dropout": "hira_dropout"},
        {"rank_pattern": {}},
        {"init_weights": True, **_LAYERS_CHOSEN},
        "hira_",
        has_groups=False,
    ),
    "IA3": Kind(IA3, (*_PLAIN, nn.Conv2d), {}, {}, {"init_ia3_weights": True}, "ia3_"),
    "ROAD": Kind(
        RoAd,
        (nn.Linear,),
        {"variant": "variant", "group_size": "group_size"},
        fixed={"init_weights": True},
        prefix="road_",
        has_exclusion=False,
    ),
    "ADALORA": Kind(
        AdaLoRA,
        (*_PLAIN, nn.Conv2d),
        peft_ranks.SETTINGS,
        peft_ranks.OTHER_VARIANTS,
        _LAYERS_CHOSEN,
        "lora_",
        has_groups=False,
    ),
}


def kind_of(method: Method) -> tuple[str, Kind] | None:
    return next(((n, kind) for n, kind in KINDS.items() if type(method) is kind.method), None)


def file_name(kind: Kind, key: str, layer: Layer) -> str:
    """PEFT's name of one of our tensors."""
    of_table = "embedding_" if kind.method is HiRA and layer.kind == "embedding" else ""
    return f"{kind.prefix}{of_table}{key}"


def file_shape(name: str, key: str, tensor: Tensor, layer: Layer, method: Any) -> tuple[int, ...]:
    """PEFT's shape of one of our tensors."""
    shape = tuple(tensor.shape)
    kernel = layer.kernel_size
    if name == "IA3" and kernel:
        return (1, *shape, *(1 for _ in kernel))
    if name == "IA3":
        return (1, *shape) if method.on_input else (*shape, 1)
    if kernel and ((name == "LOKR" and key == "w2") or (name == "HIRA" and key == "A")):
        return (shape[0], -1, *kernel)
    if kernel and name == "HIRA":
        return (*shape, *(1 for _ in kernel))
    return shape

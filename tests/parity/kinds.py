"""Every method on layers that PEFT has, on every kind of layer that it has it on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft

from lorica.methods import IA3, AdaLoRA, DoRA, HiRA, LoHa, LoKr, LoRA, RoAd, VeRA

PLACES: dict[str, tuple[str, list[str]]] = {
    "linear": ("llama", ["q_proj", "down_proj"]),
    "GPT-2's Conv1D": ("gpt2", ["c_attn"]),
    "embedding": ("llama", ["embed_tokens"]),
    "conv1d": ("wav2vec2", ["conv_layers.1.conv"]),
    "conv2d": ("vit", ["projection"]),
    "grouped conv2d": ("cnn", ["conv3"]),
    "experts": ("mixtral", ["experts.gate_up_proj", "experts.down_proj"]),
}
"""Kind of layer -> an architecture that has it, and its names there."""


@dataclass(frozen=True)
class Pair:
    """A method in both libraries.

    Attributes:
        ours, theirs: make the settings from names of layers.
        kinds: of layers whose adapters are exchanged.
    """

    ours: Callable[[list[str]], Any]
    theirs: Callable[[list[str]], peft.PeftConfig]
    kinds: tuple[str, ...] = tuple(PLACES)


_PLAIN = ("linear", "GPT-2's Conv1D")
_CONVOLVED = ("linear", "conv1d", "conv2d", "grouped conv2d")


def _lora(**settings: Any) -> Pair:
    def theirs(targets: list[str]) -> peft.PeftConfig:
        if targets[0].startswith("experts"):
            named = [f"mlp.{name}" for name in targets]
            return peft.LoraConfig(lora_alpha=5, target_parameters=named, **settings)
        return peft.LoraConfig(lora_alpha=5, target_modules=targets, **settings)

    return Pair(lambda targets: LoRA(lora_alpha=5, target_modules=targets, **settings), theirs)


PAIRS: dict[str, Pair] = {
    "lora": _lora(r=3),
    "rslora": _lora(r=3, use_rslora=True),
    "dora": Pair(
        lambda targets: DoRA(r=3, lora_alpha=5, target_modules=targets),
        lambda targets: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=targets),
        (*_PLAIN, "embedding", "conv1d", "conv2d"),
    ),
    "adalora": Pair(
        lambda targets: AdaLoRA(init_r=3, target_r=2, lora_alpha=5, target_modules=targets),
        lambda targets: peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=targets
        ),
        (*_PLAIN, "conv2d"),
    ),
    "vera": Pair(
        lambda targets: VeRA(r=16, target_modules=targets),
        lambda targets: peft.VeraConfig(r=16, target_modules=targets),
        _PLAIN,
    ),
    "loha": Pair(
        lambda targets: LoHa(r=3, lora_alpha=5, target_modules=targets),
        lambda targets: peft.LoHaConfig(r=3, alpha=5, target_modules=targets),
        _CONVOLVED,
    ),
    "lokr": Pair(
        lambda targets: LoKr(r=2, lora_alpha=5, target_modules=targets),
        lambda targets: peft.LoKrConfig(r=2, alpha=5, target_modules=targets),
        _CONVOLVED,
    ),
    "hira": Pair(
        lambda targets: HiRA(r=3, target_modules=targets),
        lambda targets: peft.HiraConfig(r=3, target_modules=targets),
        (*_PLAIN, "embedding", "conv1d", "conv2d"),
    ),
    "ia3": Pair(
        lambda targets: IA3(target_modules=targets, feedforward_modules=targets[1:]),
        lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=targets[1:]),
        (*_PLAIN, "conv2d", "grouped conv2d"),
    ),
    "road": Pair(
        lambda targets: RoAd(group_size=4, target_modules=targets),
        lambda targets: peft.RoadConfig(variant="road_1", group_size=4, target_modules=targets),
        ("linear",),
    ),
}

"""Names of layers in files for text-to-image models.

    diffusers    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
    kohya        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
    of SDXL      lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q

kohya's names have "_" for every dot, so they cannot be taken apart: they are made for every layer
of the model in hand, in all spellings, and looked up. The UNet of SDXL goes by the names of the
code that it was first published with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorica.base.image_pipeline import ImagePipeline
from lorica.files.peft_layout import LAYERS, modules_of

PARTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
"""What of a pipeline adapters are kept for, by diffusers' names. An image decoder is none of it."""
_CLIP = "text_model."
"""In front of the layers of CLIP in files; transformers 5 has it no more."""
_BY_CLASS = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
_ALSO = {"lora_te": ("lora_te1",)}
"""Other prefixes that are read: diffusers writes the second one for every text encoder."""
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def parts_of(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Part of a pipeline -> where it begins in the paths of `model`, and its module.

    Empty for what is no part of a pipeline.
    """
    if isinstance(model, ImagePipeline):
        return {name: (f"{name}.", part) for name, part in model.named_children() if name in PARTS}
    kind = type(model).__name__
    if type(model).__module__.startswith("diffusers") and "Transformer" in kind:
        return {"transformer": ("", model)}
    return {_BY_CLASS[kind]: ("", model)} if kind in _BY_CLASS else {}


def diffusers_names(model: nn.Module) -> dict[str, str]:
    """Path of a layer -> diffusers' name of it, as files of both spellings of CLIP are found."""
    return {path: names[0] for path, names in _spelled(model).items()}


def by_diffusers_name(model: nn.Module) -> dict[str, str]:
    """Every name that diffusers' files have for a layer -> its path."""
    return {name: path for path, names in _spelled(model).items() for name in names}


def _spelled(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part, (start, module) in parts_of(model).items():
        for inner in _layers(module):
            names = [f"{part}.{inner}"]
            if type(module).__name__.startswith("CLIPText") and not inner.startswith(_CLIP):
                names.insert(0, f"{part}.{_CLIP}{inner}")
            found[f"{start}{inner}"] = names
    return found


def kohya_names(model: nn.Module) -> dict[str, str]:
    """Path of a layer -> kohya's name of it; without those that kohya's tools have no names for."""
    return {path: names[0] for path, names in _flat(model).items()}


def by_kohya_name(model: nn.Module) -> dict[str, str]:
    """Every name that kohya's files have for a layer -> its path."""
    return {name: path for path, names in _flat(model).items() for name in names}


def _flat(model: nn.Module) -> dict[str, list[str]]:
    parts = parts_of(model)
    heads = _heads(parts)
    found: dict[str, list[str]] = {}
    for path, names in _spelled(model).items():
        part = names[0].partition(".")[0]
        if part not in heads:
            continue
        inner = [name.partition(".")[2] for name in names]
        first = sgm_name(inner[0], parts[part][1]) if part == "unet" and is_sdxl(parts) else None
        inner = [first, *inner] if first else inner
        spelled = [heads[part], *_ALSO.get(heads[part], ())]
        found[path] = [f"{head}.{n}".replace(".", "_") for head in spelled for n in inner]
    return found


def _heads(parts: Mapping[str, Any]) -> dict[str, str]:
    """kohya's prefix of every part that it has names for."""
    several = "text_encoder_2" in parts
    heads = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if several else "lora_te",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }
    return {part: head for part, head in heads.items() if part in parts}


def is_sdxl(parts: Mapping[str, tuple[str, nn.Module]]) -> bool:
    """Whether the UNet is of SDXL, by what it is given besides the text."""
    config: Any = getattr(parts["unet"][1], "config", None) if "unet" in parts else None
    return getattr(config, "addition_embed_type", None) == "text_time"


def sgm_name(path: str, unet: nn.Module) -> str | None:
    """The name of a layer of SDXL's UNet in the code that it was published with."""
    config: Any = unet.config
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    each = config.layers_per_block + 1
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path):
        kind, index, rest = found.groups()
        number = 2 * int(index) if kind == "resnets" else 2 * int(index) + 1
        return f"middle_block.{number}.{_within(kind, rest)}"
    pattern = r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
    found = re.match(pattern, path)
    if found is None:
        return None
    side, block, kind, index, rest = found.groups()
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * each}.0.op"
    if kind == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[int(block)]
        return f"output_blocks.{(int(block) + 1) * each - 1}.{1 + attends}.{rest}"
    number = int(block) * each + int(index) + (side == "down")
    inner = f"{int(kind == 'attentions')}.{_within(kind, rest)}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{inner}"


def _within(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest


def _layers(module: nn.Module) -> list[str]:
    return [
        path for path, layer in modules_of(module).items() if path and isinstance(layer, LAYERS)
    ]

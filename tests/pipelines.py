"""Tiny random text-to-image pipelines of diffusers, the same on every call."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers as hf
from torch import Tensor, nn

WIDTH = 32


def _text(projection: bool = False) -> nn.Module:
    config = hf.CLIPTextConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=9,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=2,
    )
    return (hf.CLIPTextModelWithProjection if projection else hf.CLIPTextModel)(config)


def _unet(**more: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **more,
    )


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipeline = make()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def stable_diffusion() -> Any:
    return _seeded(
        lambda: diffusers.StableDiffusionPipeline(
            vae=None,
            text_encoder=_text(),
            tokenizer=None,
            unet=_unet(cross_attention_dim=WIDTH),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl() -> Any:
    unet = {
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    return _seeded(
        lambda: diffusers.StableDiffusionXLPipeline(
            vae=None,
            text_encoder=_text(),
            text_encoder_2=_text(projection=True),
            tokenizer=None,
            tokenizer_2=None,
            unet=_unet(**unet),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        )
    )


def stable_diffusion_3() -> Any:
    """A diffusion transformer."""
    return _seeded(
        lambda: diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
            ),
            vae=None,
            text_encoder=_text(projection=True),
            text_encoder_2=_text(projection=True),
            text_encoder_3=None,
            tokenizer=None,
            tokenizer_2=None,
            tokenizer_3=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "sd3": stable_diffusion_3,
}


def answers(pipeline: Any) -> list[Tensor]:
    """What every part of a pipeline makes of fixed inputs."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.tensor([[0, 5, 7, 11, 2]])
    time, image = torch.tensor([7]), noise(1, 4, 8, 8)
    with torch.no_grad():
        found = [
            part(ids).last_hidden_state
            for name in ("text_encoder", "text_encoder_2")
            if (part := pipeline.components.get(name)) is not None
        ]
        if (unet := pipeline.components.get("unet")) is not None:
            words = noise(1, 5, unet.config.cross_attention_dim)
            added = {"text_embeds": noise(1, WIDTH), "time_ids": noise(1, 6)}
            more = {"added_cond_kwargs": added} if unet.config.addition_embed_type else {}
            found.append(unet(image, time, words, **more).sample)
        else:
            words, pooled = noise(1, 5, WIDTH), noise(1, WIDTH)
            found.append(pipeline.transformer(image, words, pooled, time).sample)
    return found

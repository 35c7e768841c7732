"""How pictures become noise and back: what a denoiser is asked for, and what it is given beside.

A diffusion model sees `a x + b n` of a latent x and noise n and is to say n ("epsilon"), x
("sample") or `a n - b x` ("v_prediction"); which of these, and a and b by timestep, the pipeline's
scheduler knows (Ho et al. 2020, arXiv 2006.11239; Salimans and Ho 2022, arXiv 2202.00512, section
4). With flow matching it sees `(1 - s) x + s n` and is to say n - x (Lipman et al. 2022, arXiv
2210.02747; Esser et al. 2024, arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.base.image_pipeline import ImagePipeline
from lorica.errors import BaseModelError


@dataclass(frozen=True)
class Process:
    """What a scheduler says of the way from a picture to noise.

    Attributes:
        kind: "epsilon", "sample", "v_prediction" or "flow".
        num_steps: timesteps of training.
        kept: for diffusion the share of the picture's variance that is left at each timestep
            (num_steps,); for a flow empty.
        shift: of a flow: how far timesteps are pushed towards noise.
    """

    kind: str
    num_steps: int
    kept: Tensor
    shift: float = 1.0

    @property
    def is_flow(self) -> bool:
        return self.kind == "flow"

    def times(self, shares: Tensor) -> Tensor:
        """Where in the process draws from 0 to 1 (n,) fall: timesteps, or the shares of noise of a
        flow, float64.
        """
        if not self.is_flow:
            return (shares * self.num_steps).floor().clamp_(max=self.num_steps - 1)
        return self.shift * shares / (1 + (self.shift - 1) * shares)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the denoiser is given, what it should say, and the timestep that it is told.

        Args:
            latents, noise: (n, channels, h, w).
            times: (n,), of `times`.
        """
        if self.is_flow:
            share = times.to(latents).view(-1, 1, 1, 1)
            told = (times * self.num_steps).to(latents)
            return (1 - share) * latents + share * noise, noise - latents, told
        steps = times.long()
        kept = self.kept[steps].view(-1, 1, 1, 1)
        a, b = kept.sqrt().to(latents), (1 - kept).sqrt().to(latents)
        wanted = {"epsilon": noise, "sample": latents, "v_prediction": a * noise - b * latents}
        return a * latents + b * noise, wanted[self.kind], steps.to(latents.device)


def process_of(model: ImagePipeline) -> Process:
    """The process that the pipeline's scheduler describes.

    Raises:
        BaseModelError: one that is not known.
    """
    scheduler: Any = model.pipe.scheduler
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("FlowMatch"):
        steps, shift = config.num_train_timesteps, float(getattr(config, "shift", 1.0) or 1.0)
        return Process("flow", steps, torch.empty(0), shift)
    kept, kind = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type")
    if kept is None or kind not in ("epsilon", "sample", "v_prediction"):
        raise BaseModelError(
            f"the scheduler {name} (prediction_type {kind!r}) is not known, so there is no loss",
            expected="one with epsilon, sample or v_prediction, or of flow matching",
        )
    return Process(kind, config.num_train_timesteps, kept.double().cpu())


# --- what a denoiser is given beside latents and timestep ---------------------------------------


def conditions(model: ImagePipeline, captions: Sequence[str], resolution: int) -> dict[str, Any]:
    """Keyword arguments of the denoiser for these captions, as the pipeline makes them; gradients
    reach the text encoders.

    Raises:
        BaseModelError: training is not known for this kind of pipeline.
    """
    name = type(model.pipe).__name__
    if name not in _CONDITIONS:
        raise BaseModelError(
            f"how a {name} is trained is not known here",
            expected=f"one of: {', '.join(_CONDITIONS)}; drawing and mixing work with any",
        )
    device = next(model.denoiser.parameters()).device
    return _CONDITIONS[name](model.pipe, list(captions), device, resolution)


def _of_stable_diffusion(
    pipe: Any, captions: list[str], device: torch.device, resolution: int
) -> dict[str, Any]:
    hidden, _ = pipe.encode_prompt(captions, device, 1, False)
    return {"encoder_hidden_states": hidden}


def _of_stable_diffusion_xl(
    pipe: Any, captions: list[str], device: torch.device, resolution: int
) -> dict[str, Any]:
    """Size and crop are told as of a picture that has just this size."""
    hidden, _, pooled, _ = pipe.encode_prompt(
        captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    size = [resolution, resolution, 0, 0, resolution, resolution]
    told = torch.tensor([size] * len(captions), dtype=hidden.dtype, device=device)
    return {
        "encoder_hidden_states": hidden,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": told},
    }


def _of_stable_diffusion_3(
    pipe: Any, captions: list[str], device: torch.device, resolution: int
) -> dict[str, Any]:
    hidden, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device=device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


_CONDITIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "StableDiffusionPipeline": _of_stable_diffusion,
    "StableDiffusionXLPipeline": _of_stable_diffusion_xl,
    "StableDiffusion3Pipeline": _of_stable_diffusion_3,
}
"""Class of the pipeline -> what its denoiser is given."""

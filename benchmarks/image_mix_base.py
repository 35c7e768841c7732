"""A small text-to-image pipeline from nothing: Stable Diffusion's parts in miniature, on MNIST.

    python benchmarks/image_mix_base.py --data mnist --output-dir runs/digits     (one core)

An autoencoder (32 x 32 pixels of colour to 4 x 8 x 8 latents), a CLIP text encoder of two layers
and a UNet with cross-attention. The autoencoder sees digits in many colours and slants, so that
adapters can ask for them; the UNet only upright white digits on black. Captions: "a three".
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_IMAGES = 20_000
SCHEDULE = 3000
"""Steps over which the learning rate falls. What is written are running means of the weights, which
are good long before."""


def digits(split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 32, 32) from 0 to 1, white ink on black, and their labels (n,).

    Args:
        folder: holds MNIST's four files, *-ubyte.gz.
    """
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        raw = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()
    return F.pad(raw.view(-1, 28, 28).float() / 255, (2, 2, 2, 2)), labels


def slanted(ink: Tensor, amount: Tensor | float) -> Tensor:
    """Images (n, 32, 32) with their tops pushed to the right: `amount` pixels per row (n,)."""
    amount = torch.as_tensor(amount, dtype=torch.float32).expand(len(ink))
    zero, one = torch.zeros_like(amount), torch.ones_like(amount)
    theta = torch.stack([one, amount, zero, zero, one, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(ink), 1, 32, 32], align_corners=False)
    return F.grid_sample(ink[:, None], grid, align_corners=False)[:, 0]


def coloured(ink: Tensor, colour: Tensor) -> Tensor:
    """Ink (n, 32, 32) in a colour (n, 3) or (3,), on black: (n, 3, 32, 32) from 0 to 1."""
    return ink[:, None] * colour.view(-1, 3, 1, 1)


def tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's kind that knows letters and the captions' words whole."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {piece: i for i, piece in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
            pieces[:2] = ["".join(pair)]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=8)


def autoencoder(ink: Tensor, steps: int, *, batch: int = 32) -> AutoencoderKL:
    """An autoencoder of digits in any colour and slant."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    print(f"autoencoder: {sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    began = time.perf_counter()
    for step in range(steps):
        chosen = ink[torch.randint(len(ink), (batch,))]
        white = torch.rand(batch, 1) < 0.3
        colour = torch.where(white, torch.ones(batch, 3), torch.rand(batch, 3))
        slant = torch.where(torch.rand(batch) < 0.5, 0.0, torch.rand(batch) * 1.2 - 0.3)
        image = coloured(slanted(chosen, slant), colour) * 2 - 1
        latent = vae.encode(image).latent_dist
        made = vae.decode(latent.sample()).sample
        loss = (made - image).abs().mean() + F.mse_loss(made, image) + 1e-5 * latent.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 50 == 0:
            print(step, f"{loss.item():.4f}", f"{time.perf_counter() - began:.0f} s", flush=True)
    return vae.eval()


@torch.no_grad()
def latents_of(vae: AutoencoderKL, ink: Tensor) -> Tensor:
    """Latents (n, 4, 8, 8) of white digits, and the factor that gives them unit variance."""
    image = coloured(ink, torch.ones(3)) * 2 - 1
    found = torch.cat([vae.encode(part).latent_dist.mode() for part in image.split(256)])
    vae.register_to_config(scaling_factor=round(1 / found.std().item(), 5))
    return found * vae.config.scaling_factor


def denoiser() -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer, DDIMScheduler]:
    """UNet, text encoder, tokenizer and schedule, the first two at random."""
    torch.manual_seed(1)
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    print(f"UNet: {sum(p.numel() for p in unet.parameters()):,} parameters", flush=True)
    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    return unet, text, words, schedule


def train(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    labels: Tensor,
    steps: int,
    folder: Path,
    *,
    batch: int = 48,
) -> None:
    """Train UNet and text encoder together; a tenth of the captions is left empty. Their running
    means are what `folder` gets, every 500 steps.
    """
    captions = [*(f"a {word}" for word in WORDS), ""]
    ids = pipe.tokenizer(captions, padding="max_length", max_length=8, return_tensors="pt")
    trained = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    mean = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, 2e-3, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, SCHEDULE, pct_start=0.1)
    began, window = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rows = torch.randint(len(latents), (batch,))
        label = torch.where(torch.rand(batch) < 0.1, 10, labels[rows])
        noise, at = torch.randn(batch, 4, 8, 8), torch.randint(1000, (batch,))
        hidden = pipe.text_encoder(ids.input_ids[label]).last_hidden_state
        noisy = pipe.scheduler.add_noise(latents[rows], noise, at)
        loss = F.mse_loss(pipe.unet(noisy, at, hidden).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, trained, 1 - min(0.99, step / (step + 10)))
        window += loss.item()
        if step % 100 == 0:
            spent = f"{time.perf_counter() - began:.0f} s"
            print(step, f"{window / 100:.4f}", spent, flush=True)
            window = 0.0
        if step % 500 == 0 or step == steps:
            write(pipe, trained, mean, folder)


@torch.no_grad()
def write(
    pipe: StableDiffusionPipeline, trained: list[Tensor], mean: list[Tensor], folder: Path
) -> None:
    """The pipeline with the mean tensors in place of those that are training."""
    kept = [p.clone() for p in trained]
    for parameter, average in zip(trained, mean, strict=True):
        parameter.copy_(average)
    pipe.save_pretrained(folder)
    for parameter, own in zip(trained, kept, strict=True):
        parameter.copy_(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST")
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=1000, help=f"at most {SCHEDULE}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ink, labels = (part[:NUM_IMAGES] for part in digits("train", given.data))
    vae = autoencoder(ink, given.vae_steps)
    latents = latents_of(vae, ink)
    unet, text, words, schedule = denoiser()
    pipe = StableDiffusionPipeline(
        vae, text, words, unet, schedule, None, None, requires_safety_checker=False
    )
    train(pipe, latents, labels, given.steps, given.output_dir)


if __name__ == "__main__":
    main()

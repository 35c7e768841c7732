"""Pictures with captions: a diffusion model learns to take noise away from them.

The loss of a picture is the mean squared error of what the denoiser says (see `tasks.denoising`) at
one timestep with one draw of noise. Both are functions of seed, epoch and record alone, so a run
that is gone on with trains on the same numbers; evaluation has draws of its own that never change.
The latents of a picture do not change either and are computed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.base.image_pipeline import ImagePipeline
from lorica.data.encode import Encoded, Example, Progress
from lorica.data.encoded_cache import Encoding, encoding_of
from lorica.data.images import pixels_of
from lorica.errors import ConfigError, DataError, TrainingError
from lorica.tasks.denoising import conditions, process_of
from lorica.tasks.task import Batch, Prediction, answering, device_of

EVAL_DRAWS = 4
"""Timesteps and noises per picture of an evaluation, spread over the whole process."""
VAE_BATCH = 8


@dataclass(frozen=True, eq=False)
class Picture(Example):
    """An encoded picture. `input_ids` are those of its caption, to be counted and shown; its one
    label stands for the picture.

    Attributes:
        caption: the caption.
        mean, std: of its latents (channels, h, w), float32 on the CPU.
        content: SHA-256 of file, caption and resolution: what makes it the same record.
        seed: of its noise and timestep; None: the fixed draws of an evaluation.
    """

    caption: str = ""
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    std: Tensor = field(default_factory=lambda: torch.empty(0))
    content: bytes = b""
    seed: int | None = None

    def drawn(self, seed: int, epoch: int) -> Picture:
        parts = f"{seed}/{epoch}/{self.row}".encode()
        return replace(self, seed=int.from_bytes(hashlib.sha256(parts).digest()[:7], "big"))


@dataclass(frozen=True)
class _Draw:
    """One picture at one place of the process: its latents, noise (channels, h, w), and share."""

    latents: Tensor
    noise: Tensor
    share: float


def draws_of(picture: Picture) -> list[_Draw]:
    """What the denoiser is asked about a picture: one draw in training, in an evaluation
    `EVAL_DRAWS` of them, at the middles of equal parts of the process.
    """
    if picture.seed is not None:
        generator = torch.Generator().manual_seed(picture.seed)
        noise = torch.randn(picture.mean.shape, generator=generator)
        latents = picture.mean + picture.std * torch.randn(picture.std.shape, generator=generator)
        share = torch.rand(1, generator=generator, dtype=torch.float64)
        return [_Draw(latents, noise, share.item())]
    generator = torch.Generator().manual_seed(int.from_bytes(picture.content[:7], "big"))
    return [
        _Draw(
            picture.mean,
            torch.randn(picture.mean.shape, generator=generator),
            (i + 0.5) / EVAL_DRAWS,
        )
        for i in range(EVAL_DRAWS)
    ]


@dataclass
class TextToImage:
    """Settings and arithmetic of the task.

    Attributes:
        model: the pipeline, whose autoencoder makes the latents.
        resolution: pixels of a side; None: what the denoiser was made for.
        notes: what the user should be told.
    """

    model: ImagePipeline
    resolution: int | None = None
    notes: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "text-to-image"

    def __post_init__(self) -> None:
        self._process = process_of(self.model)
        self._latents: dict[bytes, tuple[Tensor, Tensor]] = {}
        step = self.model.latent_scale * 2
        if self.side % step:
            raise ConfigError(
                f"resolution is {self.side}", expected=f"a multiple of {step} for this pipeline"
            )

    @property
    def tokenizer(self) -> Any:
        return self.model.pipe.tokenizer

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return self.resolution or self.model.resolution

    # --- records to numbers -----------------------------------------------------------------------

    def encode(self, records: Sequence[dict], *, progress: Progress | None = None) -> Encoded:
        if problems := [
            f"record {row + 1}: {', '.join(sorted(missing))} missing"
            for row, record in enumerate(records)
            if (missing := {"image", "caption"} - record.keys())
        ]:
            raise DataError(
                f"{len(problems):,} of {len(records):,} records are no pictures with captions",
                problems=problems[:5],
                mend="read them with lorica.data.images.read_images(FOLDER)",
            )
        contents = [self._content(record) for record in records]
        self._encode_latents(records, contents, progress)
        found, longest = [], int(getattr(self.tokenizer, "model_max_length", 77))
        for row, (record, content) in enumerate(zip(records, contents, strict=True)):
            ids = self.tokenizer(record["caption"], truncation=False, verbose=False).input_ids
            mean, std = self._latents[content]
            cut = max(0, len(ids) - longest)
            kept = list(ids[:longest])
            found.append(
                Picture(kept, [0], row, cut, 0, record["caption"], mean, std, content=content)
            )
        cut = sum(picture.num_cut > 0 for picture in found)
        note = f"{cut:,} captions cut to {longest} tokens"
        return Encoded(found, [note] if cut else [])

    def _content(self, record: dict) -> bytes:
        digest = record.get("sha256")
        if digest is None:
            with open(record["image"], "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        parts = f"{digest}\0{record['caption']}\0{self.side}"
        return hashlib.sha256(parts.encode("utf-8", "surrogateescape")).digest()

    def _encode_latents(
        self, records: Sequence[dict], contents: Sequence[bytes], progress: Progress | None
    ) -> None:
        """Run the autoencoder on the pictures that were not seen before."""
        vae: Any = self.model.vae
        new = {c: r for r, c in zip(records, contents, strict=True) if c not in self._latents}
        waiting = list(new.items())
        with answering(self.model):
            for start in range(0, len(waiting), VAE_BATCH):
                part = waiting[start : start + VAE_BATCH]
                pixels = [
                    torch.from_numpy(pixels_of(r["image"], self.side, vae.config.in_channels))
                    for _, r in part
                ]
                mean, std = self.model.latents(torch.stack(pixels).to(device_of(self.model)))
                for (content, _), own, spread in zip(part, mean.cpu(), std.cpu(), strict=True):
                    self._latents[content] = own.clone(), spread.clone()
                if progress is not None:
                    progress(start + len(part))

    def encoding(self) -> Encoding:
        return encoding_of(__file__, self.facts(), self.tokenizer, Picture)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "max_length": None,  # captions are as long as the text encoder takes them
            "resolution": self.side,
            "prediction": self._process.kind,
            "pipeline": type(self.model.pipe).__name__,
        }

    def shares(self, model: nn.Module) -> bool:
        return False

    def pads(self, model: nn.Module) -> bool:
        return False

    # --- loss -------------------------------------------------------------------------------------

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        (block,) = blocks
        pictures = [picture for picture in block if isinstance(picture, Picture)]
        assert len(pictures) == len(block), "a block of pictures"
        drawn = [(i, draw) for i, p in enumerate(pictures) for draw in draws_of(p)]
        device = device_of(model)
        shares = torch.tensor([draw.share for _, draw in drawn], dtype=torch.float64)
        inputs = {
            "captions": [pictures[i].caption for i, _ in drawn],
            "latents": torch.stack([draw.latents for _, draw in drawn]).to(device),
            "noise": torch.stack([draw.noise for _, draw in drawn]).to(device),
            "times": self._process.times(shares),
        }
        owners = torch.tensor([i for i, _ in drawn], device=device)
        return Batch(inputs, (owners,))

    def rectangle(self, examples: Sequence[Example], model: nn.Module) -> dict[str, Tensor]:
        """Refused: what a pipeline is given is no row of tokens."""
        raise TrainingError(
            "pictures have no tokens in rows",
            mend="set reuse_frozen_layers: false, and choose a method that asks for no such rows",
        )

    def running(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The sum over the pictures of the batch of their mean squared errors."""
        return [self._errors(batch).sum()]

    def each_loss(
        self, model: nn.Module, batch: Batch, blocks: Sequence[Sequence[Example]]
    ) -> list[list[float]]:
        return [self._errors(batch).tolist()]

    def _errors(self, batch: Batch) -> Tensor:
        """The mean squared error of every picture of a batch (pictures,), over its draws."""
        given, model = batch.inputs, self.model
        noisy, wanted, told = self._process.noisy(given["latents"], given["noise"], given["times"])
        beside = conditions(model, given["captions"], self.side)
        answer = model.denoiser(noisy.to(model.dtype), timestep=told, **beside).sample
        errors = (answer.float() - wanted).square().flatten(1).mean(1)
        (owners,) = batch.labels
        number = int(owners.max()) + 1
        sums = errors.new_zeros(number).index_add(0, owners, errors)
        return sums / errors.new_zeros(number).index_add(0, owners, torch.ones_like(errors))

    def predict(
        self,
        model: nn.Module,
        records: Sequence[dict],
        *,
        batch_size: int = 32,
        generate: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """The error of each picture by the draws of an evaluation."""
        examples, found = self.encode(records).examples, []
        with answering(model):
            for start in range(0, len(examples), batch_size):
                block = examples[start : start + batch_size]
                errors = self._errors(self.collate([block], model)).tolist()
                chosen = records[start : start + batch_size]
                found += [
                    Prediction(record, error, 1, None, ())
                    for record, error in zip(chosen, errors, strict=True)
                ]
                if progress is not None:
                    progress(len(found))
        return found

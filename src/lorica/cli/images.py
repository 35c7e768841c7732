"""What a run on pictures has in place of that on texts: records, encoding, samples."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.attach.activate import activate
from lorica.base.image_pipeline import ImagePipeline, is_pipeline
from lorica.base.known import known
from lorica.base.load import load_model
from lorica.base.request import IMAGES
from lorica.cli.material import Material
from lorica.cli.prepared import Prepared
from lorica.cli.start import begun_on, check_start
from lorica.cli.voice import Voice
from lorica.config import Resolved, RunConfig
from lorica.data.dataset import Dataset
from lorica.data.images import chosen, pixels_of, read_image_splits, read_images
from lorica.data.pack import order
from lorica.errors import ConfigError, DataError
from lorica.records.atomic import write_file
from lorica.records.folder import PICTURES, RunFolder
from lorica.records.phrases import count, parameters
from lorica.tasks import TextToImage
from lorica.tasks.drawing import draw
from lorica.train.plan import courses_of

OF_IMAGES = ("resolution", "num_inference_steps", "guidance_scale")
"""Settings that only a run on pictures has."""
_OF_TEXTS = (
    *("columns", "format", "train_on", "separator", "add_bos", "eos_token", "chat_template"),
    *("system", "max_new_tokens", "max_length", "packing", "share_prompts"),
    "trust_remote_code",
)
_PACKING = ("packing", "share_prompts")
_DRAWN_FROM = 1000
"""Seed of the first picture that is shown; the next has the next."""


def is_for_images(run: RunConfig) -> bool:
    """Whether a run is one on pictures: by its task, or by its base where the task is auto."""
    return run.task == IMAGES or (run.task == "auto" and is_pipeline(run.model))


def prepare_images(settings: Resolved, voice: Voice) -> Prepared:
    """What `prepare` does, for pictures. Raises LoricaError likewise."""
    source = check_start(settings)
    _check_settings(settings)
    with voice.work("reading the data"):
        material = gather_images(settings.run, seed=settings.data_seed)
    for line in material.statements:
        voice.say(line)
    run = settings.run
    with voice.work(f"loading {run.model}"):
        model = load_model(
            run.model, task=IMAGES, dtype=settings.train.dtype, revision=run.revision or "main"
        )
    assert isinstance(model, ImagePipeline)
    number = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    voice.say(
        f"base: {type(model.pipe).__name__}, {parameters(number)} parameters in {dtype}, for "
        f"{IMAGES}"
    )
    for note in known(model).notes:
        voice.say(f"base: {note}")
    task = TextToImage(model, run.resolution)
    parts = [_encoded(task, part, voice) for part in (material.train, material.valid)]
    examples = replace(parts[0], origins=material.train.origins)
    held_out = parts[1].examples
    begun = begun_on(settings, model, task, examples, held_out, voice, source)
    courses_of(model, task, {begun.adapter: examples}, held_out, settings.train)
    for part in begun.adapter.parts:
        voice.say(f"targets: {part.reason}")
    voice.say(f"adapter: {begun.adapter.method.kind}, {_size(begun.adapter, number)}")
    side = f"{task.side} x {task.side} pixels"
    voice.say(f"encoded: {count(len(examples))} pictures of {side}, whose latents are kept")
    for note in examples.notes:
        voice.say(f"encoded: {note}")
    made = begun.settings, material, model, begun.adapter, task, examples, held_out, ["loss"]
    return Prepared(*made, {}, begun.relevance, begun.trial)


def _size(adapter: Any, of: int) -> str:
    number = sum(len(part.slots) for part in adapter.parts)
    share = adapter.num_parameters / of
    return f"{count(adapter.num_parameters)} parameters train in {number} places ({share:.2%})"


def _check_settings(settings: Resolved) -> None:
    """Raises ConfigError for what was set and would be ignored on pictures."""
    ignored = [
        f"{settings.origins[key]}: {key} has no effect on pictures"
        for key in _OF_TEXTS
        if not settings.origins[key].startswith(("default", "rule"))
        and not (key in _PACKING and settings.values[key] in (False, "auto"))
    ]
    if settings.run.metrics not in (None, ("loss",)):
        ignored.append(f"{settings.origins['metrics']}: pictures are scored by loss alone")
    if ignored:
        raise ConfigError("settings would be ignored", problems=ignored, mend="take them out")


def _encoded(task: TextToImage, records: Dataset | None, voice: Voice) -> Any:
    rows = records.rows if records is not None else []
    with voice.work("encoding the pictures", len(rows)) as progress:
        return task.encode(rows, progress=progress)


def gather_images(run: RunConfig, *, seed: int) -> Material:
    """Read the pictures that the settings name, and hold some out where none are given to evaluate
    on. Raises DataError.
    """
    parts = read_image_splits(run.data)
    for key, split in (("eval_data", "valid"), ("test_data", "test")):
        if (given := getattr(run, key)) is not None:
            parts[split] = read_images(given)
    if "train" not in parts:
        raise DataError(f"{run.data} has no training part", mend="name the folder of pictures")
    told = [f"data: {part.statement}" for part in parts.values()]
    train, valid, scored = parts["train"], parts.get("valid"), parts.get("test")
    number = min(run.num_held_out(len(train)), len(train) - 1)
    if valid is None and number > 0:
        places = order(len(train), seed=seed).tolist()
        held, kept = sorted(places[:number]), sorted(places[number:])
        why = f"{count(number)} of {count(len(train))} held out for evaluation"
        train, valid = chosen(train, kept, why), chosen(train, held, why)
        told.append(f"{why}, drawn with seed {seed}")
    material = Material(train, valid, scored if scored is not None else valid, told)
    material.shared = scored is None and valid is not None
    if scored is None and valid is None:
        told.append("nothing is held out: base and tuned will not be compared")
    if material.scored is not None and run.eval_records and len(material.scored) > run.eval_records:
        picked = sorted(order(len(material.scored), seed=seed).tolist()[: run.eval_records])
        why = f"{count(len(picked))} of {count(len(material.scored))}, drawn with seed {seed}"
        material.scored = chosen(material.scored, picked, why)
        told.append(f"scores: on {why}")
    return material


def picture_samples(prepared: Prepared, folder: RunFolder, voice: Voice) -> list[dict]:
    """Draw the first captions with base and tuned model from the same noise, into the run folder;
    rows of samples.jsonl.
    """
    run, model = prepared.settings.run, prepared.model
    assert isinstance(model, ImagePipeline) and isinstance(prepared.task, TextToImage)
    records = (prepared.material.test or prepared.material.train.rows)[: run.num_samples]
    if not records:
        return []
    vae: Any = model.vae
    side, channels = prepared.task.side, vae.config.in_channels
    how: dict[str, Any] = {
        "seeds": [_DRAWN_FROM + i for i in range(len(records))],
        "guidance_scale": run.guidance_scale,
        "resolution": side,
    }
    if run.num_inference_steps is not None:
        how["num_inference_steps"] = run.num_inference_steps
    drawn: dict[str, list[Any]] = {}
    for name, adapter in (("before", None), ("after", prepared.adapter)):
        with voice.work(f"drawing {len(records)} pictures, {name}"), activate(model, adapter):
            drawn[name] = draw(model, [r["caption"] for r in records], **how)
    drawn["reference"] = [_as_picture(pixels_of(r["image"], side, channels)) for r in records]
    (folder.path / PICTURES).mkdir(exist_ok=True)
    rows = []
    for i, record in enumerate(records):
        files = {name: f"{PICTURES}/{i + 1}-{name}.png" for name in drawn}
        for name, file in files.items():
            write_file(folder.path / file, png(drawn[name][i]))
        rows.append({"input": record["caption"], "pictures": files})
    return rows


def _as_picture(pixels: Any) -> Any:
    """Numbers from -1 to 1 (channels, h, w) as a picture."""
    from PIL import Image

    bytes_ = ((pixels.transpose(1, 2, 0) + 1) * 127.5).round().astype("uint8")
    return Image.fromarray(bytes_ if bytes_.shape[2] == 3 else bytes_[:, :, 0])


def png(picture: Any) -> bytes:
    """A picture as the bytes of a PNG file, the same for the same picture."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def closing(folder: Path, model: str) -> list[str]:
    """The end of a run on pictures: where the results lie, and what to type next."""
    import shlex

    return [
        "",
        f"adapter  {folder / 'adapter'}",
        f"report   {folder / 'report.html'}",
        f"next     lorica grid {shlex.quote(model)} --adapters {shlex.quote(str(folder))} "
        "--weights 0,0.5,1 --prompt TEXT --output grid.png",
    ]

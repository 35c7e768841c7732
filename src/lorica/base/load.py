"""Load a base model from a folder or the hub: strictly, and without running anybody's code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from lorica.base.choose import choose_device, choose_dtype, doubts_on
from lorica.base.digest import digest_of_bytes, digest_of_files, digest_of_tensors
from lorica.base.ending import end_token_note, set_end_token
from lorica.base.hf_quantizer import OnTheWay
from lorica.base.hub import hub_options
from lorica.base.image_pipeline import INDEX_FILE, ImagePipeline, pipeline_files, read_pipeline
from lorica.base.known import Base
from lorica.base.labels import Classes, output_tensors, restart, set_labels
from lorica.base.locate import lasting_name, located, weight_files, weights_folder
from lorica.base.missing import new_modules
from lorica.base.quantize import (
    digest_of_packed,
    quantization_of,
    quantizer_of,
    remember_origins,
)
from lorica.base.quantizer import Quantizer
from lorica.base.reading import reading
from lorica.base.request import AUTO_CLASSES, IMAGES, check_request
from lorica.base.stored import OWN, fill, method_of, quantizers_of, read_stored
from lorica.base.tokenizer import load_tokenizer
from lorica.errors import BaseModelError


def load_model(
    name: str | Path,
    *,
    task: str = "causal-lm",
    dtype: str = "auto",
    labels: tuple[str, ...] = (),
    revision: str = "main",
    trust_remote_code: bool = False,
    device: str = "auto",
    eos_token: str | None = None,
    seed: int = 0,
    quantize: str | Quantizer | None = None,
    quantize_head: bool = False,
) -> nn.Module:
    """Load a pretrained model and its tokenizer; `base_of(model)` knows the rest.

    Args:
        name: a folder, a hub id, or "embedded".
        task: one of `AUTO_CLASSES`; or "text-to-image": a pipeline of diffusers, as a module whose
            `pipe` draws (`base.image_pipeline.ImagePipeline`).
        dtype: of the frozen weights: "float32", "bfloat16", "float16", or "auto": bfloat16 where
            the processor multiplies it natively, else float32; "as-stored": as the files have it.
        labels: names of the classes of a classification. The head of the files is kept where it has
            as many classes and their names are these (in its own order), numbers, or no names;
            otherwise the model gets a new one.
        trust_remote_code: run Python code that comes with the model. Never on by itself.
        device: "cpu", "cuda", ..., or "auto": the first GPU where there is one.
        eos_token: end texts with this token instead of the tokenizer's own end token.
        seed: start of the modules that the files have no weights for.
        quantize: "nf4", "fp4" or "int8" (or a quantizer with settings of its own): store the linear
            layers so. Each is quantized as soon as it is read, so that never more than one lies in
            memory in full. Norms, embeddings and the output head stay in `dtype`.
        quantize_head: quantize the output head too, where it has a weight of its own.

    Raises:
        BaseModelError: nothing there, no safetensors, an unknown task or dtype, labels without a
            classification, weights that do not fill the model.
    """
    path = located(name)
    check_request(path, task, dtype, labels, trust_remote_code)
    target = choose_device(device)
    if task == IMAGES:
        return _load_pipeline(name, path, choose_dtype(dtype, target), target, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    kind = quantizer_of(quantize) if quantize is not None else None
    way = OnTheWay(kind, head=quantize_head) if kind is not None else None
    chosen = choose_dtype(dtype, target)
    with reading(name, task), _seeded(seed):
        local = hub_options(path, revision)
        config = transformers.AutoConfig.from_pretrained(path, **options, **local)
        if stored := method_of(config):
            _refuse_twice(name, stored, kind)
        classes = set_labels(config, labels) if task == "text-classification" else Classes(())
        auto_class = getattr(transformers, AUTO_CLASSES[task])
        files = weight_files(path, revision=revision) if stored == OWN else []
        if files:
            model, info = _read_quantized(auto_class, path, config, chosen, files)
        else:
            more = {**local, **({} if way is None else {"quantization_config": way})}
            model, info = _from_pretrained(auto_class, path, config, chosen, **options, **more)
        if way is not None:
            way.finish()
        if classes.contradict:
            foreign = output_tensors(config, auto_class)
            restart(model, foreign)
            info["missing_keys"] = {*info["missing_keys"], *foreign}
    base = Base(lasting_name(name, path), task, digest="", labels=classes.names)
    base.notes += [classes.note] if classes.note else []
    base.tokenizer = load_tokenizer(name, task=task, eos_token=eos_token, **options)
    if eos_token is not None:
        set_end_token(model, base.tokenizer, eos_token)
    if task == "causal-lm" and (note := end_token_note(model, base.tokenizer)):
        base.notes.append(note)
    base.new_modules = new_modules(base, model, info, relabelled=bool(labels))
    base.notes += doubts_on(model.dtype, target)
    folder = weights_folder(path, revision)
    if quantization_of(model) is not None:
        base.digest = digest_of_packed(model)
    else:
        base.digest = digest_of_files(folder) if folder else digest_of_tensors(model)
    if kind is not None:
        base.quantize = kind.word
        remember_origins(model, weight_files(path, revision=revision))
        base.notes.append(f"its layers are quantized: {kind.settings()}")
    if target.type == "cpu":
        _leave_files(model)
    model.__dict__["_lorica_base"] = base
    return model.to(target).eval()


def _from_pretrained(
    made_by: Any,
    path: str | Path | None,
    config: Any,
    dtype: torch.dtype | Literal["auto"],
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers found missing or of another size; that is judged by name."""
    return made_by.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )


def _read_quantized(
    auto_class: Any,
    path: str | Path,
    config: Any,
    dtype: torch.dtype | Literal["auto"],
    files: list[Path],
) -> tuple[Any, dict[str, Any]]:
    """A base whose files hold layers in the format of bitsandbytes, which is not asked for them."""
    vars(config).pop("quantization_config")
    weights, layers = read_stored(files)
    way = OnTheWay(stored=quantizers_of(layers))
    made_by = auto_class._model_mapping[type(config)] if layers else auto_class
    model, info = _from_pretrained(
        made_by,
        None if layers else path,
        config,
        dtype,
        state_dict=weights,
        quantization_config=way,
    )
    way.finish()
    fill(model, layers, way.stored, model.dtype)
    info["missing_keys"] = {*info["missing_keys"]} - {f"{p}.weight" for p in layers}
    return model, info


def _load_pipeline(
    name: str | Path,
    path: str | Path,
    dtype: torch.dtype | Literal["auto"],
    target: torch.device,
    revision: str,
) -> ImagePipeline:
    """A pipeline of diffusers with what is known of it."""
    if dtype == "auto":
        raise BaseModelError(
            "dtype as-stored cannot be had for a pipeline: its parts may differ",
            expected="auto, float32, bfloat16 or float16",
        )
    options: dict[str, Any] = hub_options(path, revision, INDEX_FILE)
    if not Path(path).is_dir():
        options = {**options, "revision": revision}
    with reading(name, IMAGES):
        model = read_pipeline(path, dtype, options)
    base = Base(lasting_name(name, path), IMAGES, digest="", tokenizer=model.pipe.tokenizer)
    files = pipeline_files(Path(path)) if Path(path).is_dir() else []
    base.digest = digest_of_bytes(files) if files else digest_of_tensors(model)
    base.notes += doubts_on(dtype, target)
    if target.type == "cpu":
        _leave_files(model)
    model.__dict__["_lorica_base"] = base
    return model.to(target).requires_grad_(False).eval()


@torch.no_grad()
def _leave_files(model: nn.Module) -> None:
    """Copy what is still mapped from the weight files. A file that is overwritten in its place
    while a run trains on it would end the process (SIGBUS), or change the base unseen. Memory that
    torch did not allocate itself is told by its storage, which cannot be resized.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from `seed` on; afterwards those of the caller go on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _refuse_twice(name: str | Path, stored: str, kind: Quantizer | None) -> None:
    if kind is not None:
        raise BaseModelError(
            f"{name} is quantized already ({stored})",
            expected="a base in full precision",
            mend="load it without quantize, or name the base that it was made from",
        )

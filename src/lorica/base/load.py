"""Load a base model from a folder or the hub: strictly, and without running anybody's code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from lorica.errors import BaseModelError, nearest

EMBEDDED = Path(__file__).parent / "embedded"
"""The small language model that travels with the package; `load_model("embedded")`."""

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""Task -> the class of transformers that loads a model for it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """What is known of a base model that Lorica loaded; kept with the model.

    Attributes:
        name: folder or hub id, as given.
        task: what it was loaded for.
        digest: SHA-256 over the weight files.
        tokenizer: as transformers loads it, padding on the right.
        labels: names of the classes, in order of their index; empty for other tasks.
        new_modules: modules that the weight files lack and that were started at random: they must be trained.
        notes: what the user should be told.
    """

    name: str
    task: str
    digest: str
    tokenizer: Any = None
    labels: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """What an adapter's files say of their base."""
        return {"name": self.name, "task": self.task, "digest": self.digest}


def base_of(model: nn.Module) -> Base | None:
    """What is known of `model`, or None where Lorica did not load it."""
    return model.__dict__.get("_lorica_base")


def load_model(
    name: str | Path,
    *,
    task: str = "causal-lm",
    dtype: str = "auto",
    labels: tuple[str, ...] = (),
    revision: str = "main",
    trust_remote_code: bool = False,
    device: str = "auto",
) -> nn.Module:
    """Load a pretrained model and its tokenizer; `base_of(model)` knows the rest.

    Args:
        name: a folder, a hub id, or "embedded".
        task: one of `AUTO_CLASSES`.
        dtype: of the frozen weights: "float32", "bfloat16", "float16", or "auto": bfloat16 where the
            processor multiplies it natively, else float32; "as-stored": as the files have it.
        labels: names of the classes of a classification; the model gets a head of that size.
        trust_remote_code: run Python code that comes with the model. Never on by itself.
        device: "cpu", "cuda", ..., or "auto": the first GPU where there is one.

    Raises:
        BaseModelError: nothing there, no safetensors, an unknown task or dtype, weights that do not fill the model.
    """
    path = EMBEDDED if str(name) == "embedded" else name
    _check_request(path, task, dtype)
    target = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        model, info = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
            path,
            config=config,
            dtype=choose_dtype(dtype, target),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"{name} could not be loaded for {task}: {str(error).splitlines()[0]}",
            expected="a folder with config.json, *.safetensors and a tokenizer, or a hub id",
            mend="check the path; for a hub id also the network, HF_HUB_OFFLINE and the access token",
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    tokenizer.padding_side = "right"
    base = Base(
        str(name),
        task,
        weights_digest(path, model),
        tokenizer,
        tuple(labels) or _labels(config, task),
    )
    base.new_modules = _new_modules(name, task, model, info, base.notes)
    model.__dict__["_lorica_base"] = base
    return model.to(target).eval()


def empty_model(
    name: str | Path, *, task: str = "causal-lm", trust_remote_code: bool = False
) -> nn.Module:
    """The model as its config describes it, without weights: for counting and naming, on the meta device.

    Raises:
        BaseModelError: there is no config, or none for this task.
    """
    path = EMBEDDED if str(name) == "embedded" else Path(name) if Path(name).exists() else name
    if task not in AUTO_CLASSES:
        raise BaseModelError(
            f"unknown task {task!r}", expected=f"one of: {', '.join(AUTO_CLASSES)}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return getattr(transformers, AUTO_CLASSES[task]).from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"{name} could not be read for {task}: {str(error).splitlines()[0]}",
            expected="a folder with config.json, or a hub id",
            mend="check the path, or name another --task",
        ) from error


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """The dtype of the frozen weights; see `load_model`. "as-stored" leaves the choice to the files."""
    if dtype == "as-stored":
        return "auto"
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def weights_digest(path: str | Path, model: nn.Module) -> str:
    """SHA-256 over the weight files of a folder; over the parameters themselves where there is no folder."""
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    if not files:
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def _check_request(path: str | Path, task: str, dtype: str) -> None:
    problems = []
    if task not in AUTO_CLASSES:
        problems.append(f"unknown task {task!r}; there are {', '.join(AUTO_CLASSES)}")
    if dtype not in (*_DTYPES, "auto", "as-stored"):
        near = nearest(dtype, _DTYPES)
        problems.append(f"unknown dtype {dtype!r}; did you mean {near or 'auto'!r}?")
    folder = Path(path)
    if folder.is_dir():
        problems += _folder_problems(folder)
    elif folder.is_absolute() or str(path).startswith((".", "~")):
        problems.append(f"there is no folder {path}")
    if problems:
        raise BaseModelError("the base model cannot be loaded", problems=problems)


def _folder_problems(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return [
                f"{folder} is an adapter, not a base model: name the base, and load the adapter on it"
            ]
        return [f"{folder} has no config.json"]
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{folder}/config.json is no JSON: {error}"]
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        mend = (
            "; its pickled weights are never loaded: convert them to safetensors first"
            if pickled
            else ""
        )
        return [f"{folder} has no *.safetensors{mend}"]
    return []


def _new_modules(
    name: str | Path, task: str, model: nn.Module, info: dict, notes: list[str]
) -> tuple[str, ...]:
    """Modules without weights in the files. Only the head of a classification may be new."""
    missing = sorted(info["missing_keys"])
    heads = {"classifier", "score", "pre_classifier", "pooler", "classification_head"}
    wrong = [
        key for key in missing if task != "text-classification" or not heads & set(key.split("."))
    ]
    wrong += [f"{key[0]} (of another shape)" for key in info["mismatched_keys"]]
    if wrong:
        raise BaseModelError(
            f"the weights of {name} do not fill a {type(model).__name__}: {len(wrong)} tensors are missing",
            problems=wrong[:10],
            mend="choose the task that the model was made for",
        )
    if unused := sorted(info["unexpected_keys"]):
        notes.append(
            f"{len(unused)} tensors of the files are not used for {task}: {', '.join(unused[:3])} ..."
        )
    parts = {
        next(
            ".".join(key.split(".")[: i + 1])
            for i, word in enumerate(key.split("."))
            if word in heads
        )
        for key in missing
    }
    if parts:
        notes.append(f"new, started at random, trained whole: {', '.join(sorted(parts))}")
    return tuple(sorted(parts))


def _labels(config: Any, task: str) -> tuple[str, ...]:
    if task != "text-classification":
        return ()
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))

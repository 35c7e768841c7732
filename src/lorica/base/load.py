"""Load a base model from a folder or the hub: strictly, and without running anybody's code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.utils.hub import cached_file

from lorica.base.ending import end_token_note, set_end_token
from lorica.base.folder import folder_problems, unfit_files
from lorica.base.hf_quantizer import OnTheWay
from lorica.base.hub import hub_options, nearest_base
from lorica.base.image_pipeline import (
    INDEX_FILE,
    ImagePipeline,
    check_pipeline,
    empty_pipeline,
    pipeline_files,
    read_pipeline,
)
from lorica.base.labels import Classes, output_tensors, restart, set_labels
from lorica.base.quantize import (
    digest_of_packed,
    quantization_of,
    quantizer_of,
    remember_origins,
)
from lorica.base.quantizer import Quantizer
from lorica.base.stored import OWN, fill, method_of, quantizers_of, read_stored
from lorica.errors import BaseModelError, LoricaError, nearest

if TYPE_CHECKING:
    from lorica.base.processes import Processes

EMBEDDED = Path(__file__).parent / "embedded"
"""The small language model that travels with the package; `load_model("embedded")`."""

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""Task -> the class of transformers that loads a model for it."""

IMAGES = "text-to-image"
"""The task whose bases are pipelines of diffusers."""

SLOW_BFLOAT16 = (
    "this processor has no instructions for bfloat16: that saves memory, and is many times slower "
    "than dtype: float32"
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """What is known of a base model that Lorica loaded; kept with the model.

    Attributes:
        name: hub id as given, or the absolute path of the folder: adapters record it.
        task: what it was loaded for.
        digest: SHA-256 over the weight files; of a quantized base over its packed weights. Empty
            where the weights were changed since.
        tokenizer: as transformers loads it, padding on the right.
        labels: names of the classes, in order of their index; empty for other tasks.
        new_modules: modules that the weight files lack and that were started at random: they must
            be trained.
        quantize: the word of the quantizer that its layers went through on the way in; None where
            they lie as the files have them.
        processes: those that hold it together; None where this one has all of it.
        notes: what the user should be told.
    """

    name: str
    task: str
    digest: str
    tokenizer: Any = None
    labels: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    quantize: str | None = None
    processes: Processes | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """What an adapter's files say of their base."""
        found = {"name": self.name, "task": self.task, "digest": self.digest}
        return {**found, "quantize": self.quantize} if self.quantize else found


def processes_of(model: nn.Module) -> Processes | None:
    """The processes that hold the model together; None where this one has all of it."""
    base = base_of(model)
    return base.processes if base is not None else None


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
    path = _located(name)
    _check_request(path, task, dtype, labels, trust_remote_code)
    target = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    if task == IMAGES:
        return _load_pipeline(name, path, choose_dtype(dtype, target), target, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    local = hub_options(path, revision)
    base = Base(_lasting(name, path), task, digest="")
    kind = quantizer_of(quantize) if quantize is not None else None
    way = OnTheWay(kind, head=quantize_head) if kind is not None else None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    with _reading(name, task), _seeded(seed):
        config = transformers.AutoConfig.from_pretrained(path, **options, **local)
        if stored := method_of(config):
            _refuse_twice(name, stored, kind)
        if stored == OWN and (files := _files_of(path, revision)):
            vars(config).pop("quantization_config")
            weights, layers = read_stored(files)
            way, local = OnTheWay(stored=quantizers_of(layers)), {}
            options = {"state_dict": weights}
        if way is not None:
            options["quantization_config"] = way
        auto_class = getattr(transformers, AUTO_CLASSES[task])
        classes = set_labels(config, labels) if task == "text-classification" else Classes(())
        found: Any = auto_class._model_mapping[type(config)] if layers else auto_class
        model, info = found.from_pretrained(
            None if layers else path,
            config=config,
            dtype=choose_dtype(dtype, target),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # judged below, by name
            output_loading_info=True,
            **options,
            **local,
        )
        if way is not None:
            way.finish()
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        if layers and way is not None:
            fill(model, layers, way.stored, model.dtype)
            info["missing_keys"] = {*info["missing_keys"]} - {f"{p}.weight" for p in layers}
        if classes.contradict:
            foreign = output_tensors(config, auto_class)
            restart(model, foreign)
            info["missing_keys"] = {*info["missing_keys"], *foreign}
    base.labels = classes.names
    base.notes += [classes.note] if classes.note else []
    base.tokenizer = load_tokenizer(name, task=task, eos_token=eos_token, **options)
    if eos_token is not None:
        set_end_token(model, base.tokenizer, eos_token)
    if task == "causal-lm" and (note := end_token_note(model, base.tokenizer)):
        base.notes.append(note)
    base.new_modules = _new_modules(base, model, info, relabelled=bool(labels))
    if target.type == "cpu" and model.dtype == torch.bfloat16 and not _cpu_has_bfloat16():
        base.notes.append(SLOW_BFLOAT16)
    folder = _weights_folder(path, revision)
    if quantization_of(model) is not None:
        base.digest = digest_of_packed(model)
    else:
        base.digest = digest_of_files(folder) if folder else digest_of_tensors(model)
    if kind is not None:
        base.quantize = kind.word
        remember_origins(model, _files_of(path, revision))
        base.notes.append(f"its layers are quantized: {kind.settings()}")
    if target.type == "cpu":
        _leave_files(model)
    model.__dict__["_lorica_base"] = base
    return model.to(target).eval()


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
    with _reading(name, IMAGES):
        model = read_pipeline(path, dtype, options)
    known = Base(_lasting(name, path), IMAGES, digest="", tokenizer=model.pipe.tokenizer)
    files = pipeline_files(Path(path)) if Path(path).is_dir() else []
    known.digest = _digest_of(files) if files else digest_of_tensors(model)
    if target.type == "cpu":
        _leave_files(model)
        if dtype == torch.bfloat16 and not _cpu_has_bfloat16():
            known.notes.append(SLOW_BFLOAT16)
    model.__dict__["_lorica_base"] = known
    return model.to(target).requires_grad_(False).eval()


def load_tokenizer(
    name: str | Path,
    *,
    task: str = "causal-lm",
    revision: str = "main",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
) -> Any:
    """The tokenizer of a base as `load_model` would set it up, without its weights.

    Raises:
        BaseModelError: there is none, or it does not know `eos_token`.
    """
    path = _located(name)
    _refuse(unfit_files(Path(path)))
    options = {"trust_remote_code": trust_remote_code, **hub_options(path, revision)}
    with _reading(name, task):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision, **options)
    tokenizer.padding_side = "right"
    if eos_token is not None:
        set_end_token(None, tokenizer, eos_token)
    return tokenizer


def empty_model(
    name: str | Path,
    *,
    task: str = "causal-lm",
    revision: str = "main",
    trust_remote_code: bool = False,
    labels: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    change: Callable[[Any], None] | None = None,
    device: str = "meta",
) -> nn.Module:
    """The model as its config describes it, without weights: for counting and naming, on the meta
    device.

    Args:
        labels: classes of a classification; empty: those of the config.
        dtype: of the parameters; None: as the config says.
        change: is handed the config before the model is made of it.
        device: "meta", or one where the parameters shall be: with random values.

    Raises:
        BaseModelError: there is no config, or none for this task.
    """
    path = _located(name)
    if task == IMAGES:
        check_pipeline(Path(path))
        with _reading(name, task):
            return empty_pipeline(Path(path))
    if task not in AUTO_CLASSES:
        raise BaseModelError(
            f"unknown task {task!r}", expected=f"one of: {', '.join((*AUTO_CLASSES, IMAGES))}"
        )
    _refuse(_path_problems(Path(path), trust_remote_code, weights=False))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    local = hub_options(path, revision)
    with _reading(name, task):
        config = transformers.AutoConfig.from_pretrained(
            path, revision=revision, **options, **local
        )
        if labels:
            set_labels(config, labels)
        if change is not None:
            change(config)
        if dtype is not None:
            options["dtype"] = dtype
        with torch.device(device):
            return getattr(transformers, AUTO_CLASSES[task]).from_config(config, **options)


def missing_heads(
    name: str | Path,
    model: nn.Module,
    *,
    labels: tuple[str, ...] = (),
    revision: str = "main",
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """The modules of a classification's head for which the weight files have nothing that fits, as
    the headers of the files say: what `load_model` would start at random with these labels.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    foreign: set[str] = set()
    with _reading(name, "text-classification"):
        config = transformers.AutoConfig.from_pretrained(_located(name), **options)
        if labels and set_labels(config, labels).contradict:
            foreign = output_tensors(config, transformers.AutoModelForSequenceClassification)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(name, revision=revision):
        with safe_open(file, framework="pt") as stored:
            shapes |= {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return tuple(
        sorted(
            {
                _head_of(key)
                for key, tensor in model.state_dict().items()
                if _HEADS & set(key.split("."))
                and (
                    key in foreign
                    or tuple(tensor.shape)
                    not in (shapes.get(key), shapes.get(key.removeprefix(prefix)))
                )
            }
        )
    )


def weight_files(name: str | Path, *, revision: str = "main") -> list[Path]:
    """The weight files of a base on this machine; none where it must be fetched first."""
    folder = _weights_folder(_located(name), revision)
    return sorted(folder.glob("*.safetensors")) if folder else []


def _located(name: str | Path) -> str | Path:
    """The embedded model's folder, a folder with ~ resolved, or the hub id as it is."""
    if str(name) == "embedded":
        return EMBEDDED
    return Path(name).expanduser() if str(name).startswith("~") else name


def _lasting(name: str | Path, path: str | Path) -> str:
    """What names the base from everywhere: a relative path would be another folder elsewhere, or
    even a stranger's model on the hub.
    """
    folder = Path(path)
    return str(folder.absolute()) if path is not EMBEDDED and folder.is_dir() else str(name)


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
def _reading(name: str | Path, task: str) -> Iterator[None]:
    """Call transformers without its bars and log lines; whatever it raises is a BaseModelError."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except LoricaError:
        raise
    except Exception as error:  # its readers raise what they like: OSError, Exception, RuntimeError
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BaseModelError(
            f"{name} could not be loaded for {task}: {reason}",
            expected="a folder with config.json, *.safetensors and a tokenizer, or a hub id",
            mend="check the path; for a hub id also the network, HF_HUB_OFFLINE and the access "
            "token",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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


def _files_of(path: str | Path, revision: str) -> list[Path]:
    """The weight files, where they are on this machine."""
    folder = _weights_folder(path, revision)
    return sorted(folder.glob("*.safetensors")) if folder else []


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """The dtype of the frozen weights; see `load_model`. "as-stored" leaves the choice to the
    files.
    """
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


def digest_of_files(folder: Path) -> str:
    """SHA-256 over the weight files of a folder, in the order of their names."""
    return _digest_of(sorted(folder.glob("*.safetensors")))


def _digest_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def digest_of(model: nn.Module) -> str:
    """SHA-256 that stands for the very numbers of a base: of its files where they hold them as they
    are, else of its tensors. (That of a quantized base's packed weights is the same in every dtype,
    and leaves out the numbers of what is not packed.)
    """
    base = base_of(model)
    exact = base is not None and base.digest and base.quantize is None
    return base.digest if exact and base else digest_of_tensors(model)


def digest_of_tensors(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers that a model saves."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(key.encode())
        digest.update(raw.numpy())
    return digest.hexdigest()


def _weights_folder(path: str | Path, revision: str) -> Path | None:
    """Where the weight files lie: the folder itself, or the hub's copy of them on this machine."""
    if Path(path).is_dir():
        return Path(path)
    config = cached_file(
        str(path),
        "config.json",
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(config).parent if config else None


def _check_request(
    path: str | Path, task: str, dtype: str, labels: tuple[str, ...], trust_remote_code: bool
) -> None:
    problems = []
    if task not in (*AUTO_CLASSES, IMAGES):
        problems.append(f"unknown task {task!r}; there are {', '.join((*AUTO_CLASSES, IMAGES))}")
    elif labels and task != "text-classification":
        problems.append(f"labels belong to text-classification and have no effect on {task}")
    if len(labels) == 1 or len(set(labels)) < len(labels):
        problems.append(f"labels must be at least two different names, not {', '.join(labels)}")
    if dtype not in (*_DTYPES, "auto", "as-stored"):
        near = nearest(dtype, _DTYPES)
        problems.append(f"unknown dtype {dtype!r}; did you mean {near or 'auto'!r}?")
    if task == IMAGES and Path(path).is_dir():
        _refuse(problems)
        check_pipeline(Path(path))
        return
    _refuse(problems + _path_problems(Path(path), trust_remote_code))


def _path_problems(
    folder: Path, trust_remote_code: bool = False, weights: bool = True
) -> list[str]:
    """What is wrong with the path of a base, where it is one."""
    if not str(folder).strip(". "):
        return ["the name of the base is empty"]
    try:
        there = folder.exists()
    except (OSError, ValueError) as error:
        return [f"{str(folder)[:60]!r} can be no path: {getattr(error, 'strerror', error)}"]
    if there:
        return folder_problems(folder, trust_remote_code=trust_remote_code, weights=weights)
    if not folder.is_absolute() and not str(folder).startswith("."):
        return []  # a name on the hub
    near = nearest_base(str(folder))
    return [f"there is no folder {folder}" + (f"; did you mean {near}?" if near else "")]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise BaseModelError("the base model cannot be loaded", problems=problems)


_HEADS = frozenset({"classifier", "score", "pre_classifier", "pooler", "classification_head"})
"""What transformers calls the modules of a classification's head."""


def _new_modules(base: Base, model: nn.Module, info: dict, *, relabelled: bool) -> tuple[str, ...]:
    """Modules without weights in the files. Only the head of a classification may be new, and
    replace that of the files only where other classes are wanted.
    """
    replaced = {str(key[0]) for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) | replaced)

    def may_be_new(key: str) -> bool:
        is_head = base.task == "text-classification" and bool(_HEADS & set(key.split(".")))
        return is_head and (relabelled or key not in replaced)

    wrong = [
        f"{key} (of another shape)" if key in replaced else key
        for key in missing
        if not may_be_new(key)
    ]
    if wrong:
        raise BaseModelError(
            f"the weights of {base.name} do not fill a {type(model).__name__}: {len(wrong)} "
            "tensors are missing",
            problems=wrong[:10],
            mend="choose the task that the model was made for",
        )
    if unused := sorted(info["unexpected_keys"]):
        shown = ", ".join(unused[:3]) + (" ..." if unused[3:] else "")
        base.notes.append(
            f"{len(unused)} tensors of the files are not used for {base.task}: {shown}"
        )
    parts = sorted({_head_of(key) for key in missing})
    if parts:
        base.notes.append(f"new, started at random, to be trained whole: {', '.join(parts)}")
    return tuple(parts)


def _head_of(key: str) -> str:
    """The path down to the module of the head that a tensor belongs to."""
    words = key.split(".")
    return ".".join(words[: next(i for i, word in enumerate(words) if word in _HEADS) + 1])

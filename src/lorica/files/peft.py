"""The adapter folder of PEFT: adapter_config.json, adapter_model.safetensors, README.md.

Beside them lies our own lorica.json. Writing gives the same bytes for the same adapter, whole or
not at all. Reading is strict: every tensor must find its place and every place its tensors, names
and shapes are checked before any data is read, and on any error the model is left as it was. No
pickle is loaded, and nothing that the files name is imported or fetched.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.attach import Adapter, attach_tensors
from lorica.base.load import base_of
from lorica.errors import AdapterFileError, LoricaWarning
from lorica.files.folder import MAX_JSON_BYTES, new_folder, read_json
from lorica.files.peft_config import PeftConfig, parse_config
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.peft_plan import Plan, plan
from lorica.files.peft_written import to_peft, written_config
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.methods.method import Tensors
from lorica.records.atomic import write_file

CONFIG, WEIGHTS, CARD, PROVENANCE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "lorica.json",
)
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
_SHOWN = 5


# --- writing --------------------------------------------------------------------------------------


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    model_card: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a folder that PEFT reads too.

    Args:
        adapter: the handle that `attach` or `load_adapter` gave.
        folder: appears whole or not at all.
        model_card: the text of README.md; a short one is written where there is none.
        provenance: goes into lorica.json beside versions and base; never needed to load.
        tokenizer: written into the folder as well, by its own `save_pretrained`.
        overwrite: replace an adapter that is there.

    Raises:
        AdapterFileError: the folder exists; a tensor is empty or not finite; the method has no
            layout in PEFT.
    """
    written = to_peft(adapter)
    config = written_config(adapter, written)
    text = _json(config)
    if len(text) > MAX_JSON_BYTES:
        raise AdapterFileError(
            f"{CONFIG} would have {len(text):,} bytes; at most {MAX_JSON_BYTES:,} are read back",
            mend="use fewer different ranks and alphas",
        )
    if written.unreadable:
        warnings.warn(
            f"PEFT's layout cannot name {len(written.unreadable)} of the adapted places "
            f"({', '.join(written.unreadable[:3])}): Lorica reads this adapter back, PEFT does not",
            LoricaWarning,
            stacklevel=2,
        )
    with new_folder(
        folder, marker=CONFIG, overwrite=overwrite, error=AdapterFileError
    ) as temporary:
        write_tensors(temporary / WEIGHTS, written.tensors)
        write_file(temporary / CONFIG, text)
        write_file(temporary / CARD, model_card or _card(adapter, config))
        write_file(temporary / PROVENANCE, _json(_facts(adapter, provenance)))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)


def _facts(adapter: Adapter, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    versions = {
        name: found for name in ("lorica", "torch", "transformers") if (found := _version(name))
    }
    return {
        **(provenance or {}),
        "format": 1,
        "versions": versions,
        "base": dict(adapter.base),
        "reason": adapter.reason,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"this cannot be written as JSON: {error}") from error


def _card(adapter: Adapter, config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    head = ["---", "library_name: peft", "tags:", "- lora", "- lorica"]
    head += [f"base_model: {json.dumps(base)}"] if base else []
    places = f"{len(adapter.slots)} places, {adapter.num_parameters:,} parameters"
    lines = [
        *head,
        "---",
        "",
        "# LoRA adapter",
        "",
        f"r = {config['r']}, lora_alpha = {config['lora_alpha']}; {places}.",
        "",
        "```python",
        "import lorica",
        f"model = lorica.load_model({json.dumps(base or 'PATH OF THE BASE')})",
        'lorica.load_adapter(model, "THIS FOLDER", name="adapter")',
        'lorica.activate(model, "adapter")',
        "```",
        "",
        "`PeftModel.from_pretrained(base, folder)` of PEFT reads it as well.",
        "",
    ]
    return "\n".join(lines)


# --- reading --------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
) -> Adapter:
    """Read an adapter folder, written by Lorica or by PEFT, and put the adapter on `model`.

    Args:
        model: the base that the adapter was made for. It is frozen, as by `attach`.
        folder: holds adapter_config.json and adapter_model.safetensors. A tokenizer or template
            beside them is not looked at.
        name: the adapter's name on this model; "default" where none is given.
        allow_other_base: load although lorica.json says that the base had other weights.

    Raises:
        AdapterFileError: the folder is incomplete, hostile, of another method or for another base.
            One error for everything that is wrong.
        ConfigError: the name is taken or unusable.
    """
    folder = Path(folder)
    _check_folder(folder)
    config = parse_config(read_json(folder / CONFIG), str(folder / CONFIG))
    facts = _read_facts(folder)
    _check_base(model, config, facts, folder, allow_other_base)
    with TensorFile(folder / WEIGHTS) as file:
        found = plan(model, {key: entry.shape for key, entry in file.entries.items()}, config)
        _check_plan(found, model, folder)
        tensors = _read(file, found)
    adapter = attach_tensors(
        model,
        config.method,
        {path: place for path, place in found.places.items() if path in tensors},
        tensors,
        name="default" if name is None else name,
        reason=str(facts.get("reason") or f"read from {folder.name}"),
    )
    from_file = {"name": config.base_name, "task": config.task, **_base_facts(facts)}
    adapter.base = {**{k: str(v) for k, v in from_file.items() if v}, **adapter.base}
    return adapter


def _check_folder(folder: Path) -> None:
    """Say what a folder is that is no adapter folder."""
    if not folder.is_dir():
        raise AdapterFileError(f"there is no folder {folder}", mend="check the path")
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles and not (folder / WEIGHTS).exists():
        raise AdapterFileError(
            f"{folder / pickles[0]} is a pickle, which can run code when read; none is loaded",
            expected=WEIGHTS,
            mend="convert it where you trust it: torch.load(file, weights_only=True), then "
            "safetensors.torch.save_file(tensors, 'adapter_model.safetensors')",
        )
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
    if not lacking:
        return
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    mend = "check the path"
    if inner:
        mend = f"did you mean {folder / inner[0]}?"
    elif (folder / "config.json").exists():
        mend = "this looks like a whole model: load it as the base"
    raise AdapterFileError(f"{folder} is no adapter: it lacks {' and '.join(lacking)}", mend=mend)


def _read_facts(folder: Path) -> dict[str, Any]:
    """Our own lorica.json; other writers have none."""
    path = folder / PROVENANCE
    return read_json(path) if path.is_symlink() or path.exists() else {}


def _base_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    base = facts.get("base")
    if not isinstance(base, dict):
        return {}
    return {key: base[key] for key in ("name", "task", "digest") if isinstance(base.get(key), str)}


def _check_base(
    model: nn.Module,
    config: PeftConfig,
    facts: Mapping[str, Any],
    folder: Path,
    allow_other_base: bool,
) -> None:
    """Other weights are an error; another name alone may be the same model elsewhere."""
    known = base_of(model)
    if known is None:
        return
    made_on = _base_facts(facts)
    here, there = known.facts().get("digest"), made_on.get("digest")
    if here and there:
        if here != there and not allow_other_base:
            raise AdapterFileError(
                f"{folder} was made for another base: the digest of its weights was {there[:12]}, "
                f"here it is {here[:12]}",
                expected=f"the base {made_on.get('name') or config.base_name}",
                mend="load that base; or pass allow_other_base=True if you know that they agree",
            )
        return
    name, own = config.base_name, known.facts().get("name")
    if name and own and _last(name) != _last(own):
        warnings.warn(
            f"{folder} was made for the base {name}, and this is {own}: its answers may be poor "
            "unless these are the same model",
            LoricaWarning,
            stacklevel=3,
        )


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


def _check_plan(found: Plan, model: nn.Module, folder: Path) -> None:
    """One error for all tensors that do not fit, with counts and the likely cause."""
    problems = []
    kinds = {
        "tensors of the file have no place in this model": found.unexpected,
        "tensors are missing from the file": found.missing,
        "tensors have other shapes than the base needs": found.misshapen,
    }
    for what, single in kinds.items():
        if single:
            shown = [f"    {text}" for text in single[:_SHOWN]]
            problems += [f"{len(single)} {what}, such as", *shown]
    if not found.places and not problems:
        problems = ["the file holds no tensors"]
    if problems:
        raise AdapterFileError(
            f"{folder} does not fit this {type(model).__name__}",
            problems=problems,
            mend=_prefix_hint(found, model) or "load the base that the adapter was made for",
        )


def _prefix_hint(found: Plan, model: nn.Module) -> str | None:
    """Whether the paths would fit with more or fewer names in front."""
    stems = [text.split(":")[0] for text in found.unexpected[:50]]
    paths = {path for path in modules_of(model) if path}
    for stem in stems:
        path = stem.removeprefix(PREFIX).split(".lora_")[0]
        parts = path.split(".")
        for cut in range(1, len(parts) - 1):
            if ".".join(parts[cut:]) in paths:
                extra = ".".join(parts[:cut])
                return (
                    f"the file's paths start with {extra!r}, which this model lacks: load the "
                    "class of model that has it"
                )
        if longer := min((p for p in paths if p.endswith(f".{path}")), default=None):
            extra = longer.removesuffix(f".{path}")
            return (
                f"this model's paths start with {extra!r}, which the file lacks: load the adapter "
                f"on model.{extra}"
            )
        if not stem.startswith(PREFIX) and ".lora_" in stem:
            return f"keys of PEFT start with {PREFIX!r}; this file has another layout"
    return None


def _read(file: TensorFile, found: Plan) -> dict[str, Tensors]:
    """The tensors of every place, checked to be finite, in the order of the file."""
    for key, own in found.repeated.items():
        if not torch.equal(file.read(key).to(own.dtype), own.detach().cpu()):
            raise AdapterFileError(
                f"{key} differs from the base: the base of this adapter had other weights there",
                mend="load that base, for example with its enlarged vocabulary",
            )
    tensors: dict[str, Tensors] = {}
    for path, (spot, key_A, key_B) in found.factors.items():
        A, B = _wide(file.read(key_A)), _wide(file.read(key_B))
        if (
            spot.core != spot.path
            and spot.matched in _attentions(found)
            and not (A.any() or B.any())
        ):
            continue  # PEFT has factors for both projections of an attention; these say nothing
        tensors[path] = spot.from_file(A, B)
    for path, keys in found.copies.items():
        tensors[path] = {name: _wide(file.read(key)) for name, key in keys.items()}
    assert set(tensors) <= set(found.places)
    return tensors


def _attentions(found: Plan) -> set[str]:
    return {
        spot.core
        for spot, _, _ in found.factors.values()
        if isinstance(found.places[spot.path][0], nn.MultiheadAttention)
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

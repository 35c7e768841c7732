"""An adapter as a folder: adapter_config.json, adapter_model.safetensors, README.md, lorica.json.

An adapter that was trained on top of another one holds that too, as a folder of its own, `on/`.

The first two are in a layout of PEFT wherever PEFT has the method (`peft`, `peft_kinds`,
`peft_prompts`), else in our own (`native`). Writing gives the same bytes for the same adapter,
whole or not at all. Reading is strict: every tensor must find its place and every place its
tensors, names and shapes are checked before any data is read, and on any error the model is left as
it was. No pickle is loaded, and nothing that the files name is imported or fetched.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.attach import attach_tensors, detach
from lorica.attach.handle import Adapter
from lorica.attach.stages import check_stack, check_stages, check_union, lay_on
from lorica.base.known import base_of
from lorica.errors import AdapterFileError, LoricaWarning
from lorica.files import native, peft, peft_kinds, peft_prompts
from lorica.files.folder import MAX_JSON_BYTES, new_folder, open_regular, read_json
from lorica.files.formats import FORMATS, recognised, some_keys
from lorica.files.found import Found
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.methods.method import Method
from lorica.records.atomic import write_file

LAYOUTS = (peft, peft_kinds, peft_prompts, native)
"""How the first two files may be laid out: the first that fits is written.

A layout has `fits(adapter)`, `write(adapter)`, and for reading `claims(config)`,
`base_name(config)`, `settings(config, folder)` and `read(model, config, file, folder)`.
"""
CONFIG, WEIGHTS, CARD, PROVENANCE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "lorica.json",
)
BELOW = "on"
"""The folder of the adapter that this one was trained on top of."""
MAX_STAGES = 8
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


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
    """Write an adapter as a folder, which PEFT reads too where it has the method.

    The adapter that it lies on is written with it, into the folder `on`.

    Args:
        adapter: the handle that `attach` or `load_adapter` gave.
        folder: appears whole or not at all.
        model_card: the text of README.md; a short one is written where there is none.
        provenance: goes into lorica.json beside versions and base; never needed to load.
        tokenizer: written into the folder as well, by its own `save_pretrained`.
        overwrite: replace an adapter that is there.

    Raises:
        AdapterFileError: the folder exists; a tensor is empty or not finite; the adapter sits on
            the model itself, which has no name.
    """
    layout = next(layout for layout in LAYOUTS if layout.fits(adapter))
    config, tensors = layout.write(adapter)
    text = _json(config)
    if len(text) > MAX_JSON_BYTES:
        raise AdapterFileError(
            f"{CONFIG} would have {len(text):,} bytes; at most {MAX_JSON_BYTES:,} are read back",
            mend="use fewer different ranks and alphas",
        )
    with new_folder(
        folder, marker=CONFIG, overwrite=overwrite, error=AdapterFileError
    ) as temporary:
        write_tensors(temporary / WEIGHTS, tensors)
        write_file(temporary / CONFIG, text)
        write_file(temporary / CARD, model_card or _card(adapter, layout is not native))
        facts = _facts(adapter, provenance)
        if (below := adapter.on) is not None:
            save_adapter(below, temporary / BELOW, provenance=below.noted)
            on = {"method": below.method.kind, "digest": digest_of(temporary / BELOW)}
            facts["on"] = {**on, "together": adapter.together, "stacked": adapter.stacked}
        write_file(temporary / PROVENANCE, _json(facts))
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
        **({"began_from": dict(adapter.began_from)} if adapter.began_from else {}),
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


def _card(adapter: Adapter, for_peft: bool) -> str:
    base = adapter.base.get("name")
    head = ["---", f"library_name: {'peft' if for_peft else 'lorica'}", "tags:"]
    head += [f"- {tag}" for tag in dict.fromkeys((adapter.method.kind, "lorica"))]
    head += [f"base_model: {json.dumps(base)}"] if base else []
    places = f"{len(adapter.slots)} places, {adapter.num_parameters:,} parameters"
    method: Any = adapter.method
    size = f"r = {method.r}, lora_alpha = {method.lora_alpha}; " if method.kind == "lora" else ""
    lines = [
        *head,
        "---",
        "",
        f"# {'LoRA' if method.kind == 'lora' else method.kind} adapter",
        "",
        f"{size}{places}.",
        "",
        *([_on_top(adapter), ""] if adapter.on is not None else []),
        "```python",
        "import lorica",
        f"model = lorica.load_model({json.dumps(base or 'PATH OF THE BASE')})",
        'lorica.load_adapter(model, "THIS FOLDER", name="adapter")',
        'lorica.activate(model, "adapter")',
        "```",
        "",
    ]
    if for_peft and adapter.on is None:
        lines += ["`PeftModel.from_pretrained(base, folder)` of PEFT reads it as well.", ""]
    return "\n".join(lines)


def _on_top(adapter: Adapter) -> str:
    """What the card says of the adapters below."""
    below = ", ".join(stage.method.kind for stage in adapter.stages[:-1])
    return (
        f"It was trained {'together with' if adapter.together else 'on top of'} another adapter "
        f"({below}), which lies in the folder `{BELOW}` and must act with it. Lorica loads both."
    )


def digest_of(folder: Path) -> str:
    """SHA-256 of the tensors of an adapter folder."""
    digest = hashlib.sha256()
    with open_regular(folder / WEIGHTS) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
) -> Adapter:
    """Read an adapter, written by Lorica, PEFT or another tool, and put it on `model`.

    Args:
        model: the base that the adapter was made for. It is frozen, as by `attach`.
        folder: holds adapter_config.json and adapter_model.safetensors; or a file or folder in one
            of `formats.FORMATS`, known by what it holds. A tokenizer or template beside them is not
            looked at. The adapter that it was trained on top of is read too, acts with it and is
            detached with it; its name is that of this one and ".on".
        name: the adapter's name on this model; "default" where none is given.
        allow_other_base: load although lorica.json says that the base had other weights.

    Raises:
        AdapterFileError: the folder is incomplete, hostile, of another method or for another base.
            One error for everything that is wrong.
        ConfigError: the name is taken or unusable.
    """
    name = "default" if name is None else name
    if (foreign := recognised(Path(folder))) is not None and foreign.read is not None:
        found = foreign.read(model, Path(folder))
        _check_base(model, found.base_name, {}, Path(folder), allow_other_base)
        return _put(model, found, name, f"read from {Path(folder).name}", {})
    folders = _stages(Path(folder))
    loaded: Adapter | None = None
    try:
        for depth, stage in reversed([*enumerate(folders)]):
            one = _load(model, stage, f"{name}{'.on' * depth}", allow_other_base, loaded)
            one.comes_along = depth > 0
            loaded = one
    except BaseException:
        if loaded is not None:
            detach(model, loaded)
        raise
    assert loaded is not None
    return loaded


def settings_of(folder: str | Path) -> Method:
    """The settings of the adapter in a folder, without its base or its tensors.

    Raises:
        AdapterFileError: the folder holds no adapter, or one that Lorica does not know.
    """
    folder = Path(folder)
    check_folder(folder)
    raw = read_json(folder / CONFIG)
    return next((layout for layout in LAYOUTS if layout.claims(raw)), peft).settings(raw, folder)


def _stages(folder: Path) -> list[Path]:
    """An adapter's folder and those of the adapters below it, the topmost first.

    Raises:
        AdapterFileError: one of them is missing, or another one than it was; or there are too many.
    """
    found = [folder]
    while (on := read_facts(found[-1]).get("on")) is not None:
        below = found[-1] / BELOW
        if below.is_symlink() or not below.is_dir():
            raise AdapterFileError(
                f"{found[-1]} was trained on top of an adapter, and there is no folder {below}",
                mend="copy the whole adapter, with its folders",
            )
        check_folder(below)
        if not isinstance(on, dict) or on.get("digest") != digest_of(below):
            raise AdapterFileError(
                f"{below} is another adapter than the one that {found[-1]} was trained on",
                expected="the tensors whose digest lorica.json has",
                mend="copy the whole adapter again, with its folders",
            )
        found.append(below)
        if len(found) > MAX_STAGES:
            raise AdapterFileError(
                f"{folder}: more than {MAX_STAGES} adapters lie on top of each other",
                expected=f"at most {MAX_STAGES}",
            )
    return found


def _load(
    model: nn.Module, folder: Path, name: str, allow_other_base: bool, below: Adapter | None
) -> Adapter:
    """Read one folder, and put its adapter on top of `below`."""
    check_folder(folder)
    raw = read_json(folder / CONFIG)
    layout = next((layout for layout in LAYOUTS if layout.claims(raw)), peft)
    facts = read_facts(folder)
    _check_base(model, layout.base_name(raw), facts, folder, allow_other_base)
    empty = layout is peft_kinds and peft_kinds.may_be_empty(raw)
    with TensorFile(folder / WEIGHTS, allow_empty=empty) as file:
        found = layout.read(model, raw, file, folder)
    together = below is not None and facts["on"].get("together") is True
    check_stages(found.method, below)
    stacked = below is not None and facts["on"].get("stacked") is True
    check_union(found.method, below, together)
    check_stack(below, stacked)
    reason = str(facts.get("reason") or f"read from {folder.name}")
    adapter = _put(model, found, name, reason, facts)
    if below is not None:
        lay_on(adapter, below, together, stacked)
    return adapter


def _put(
    model: nn.Module, found: Found, name: str, reason: str, facts: Mapping[str, Any]
) -> Adapter:
    """Attach what files held, with what they say of their base."""
    adapter = attach_tensors(
        model, found.method, found.places, found.tensors, name=name, reason=reason
    )
    from_file = {"name": found.base_name, "task": found.task, **_base_facts(facts)}
    adapter.base = {**{k: str(v) for k, v in from_file.items() if v}, **adapter.base}
    adapter.noted = dict(facts)
    return adapter


def check_folder(folder: Path) -> None:
    """Raises AdapterFileError that says what a folder is that is no adapter folder."""
    if folder.is_file():
        raise AdapterFileError(
            f"{folder} is a file in no format of an adapter that is known here",
            problems=[f"it holds {key[:100]}" for key in some_keys(folder)],
            expected=f"an adapter folder of Lorica or PEFT, or one of: {', '.join(FORMATS)}",
        )
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


def read_facts(folder: Path) -> dict[str, Any]:
    """Our own lorica.json; other writers have none."""
    path = folder / PROVENANCE
    return read_json(path) if path.is_symlink() or path.exists() else {}


def _base_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    base = facts.get("base")
    if not isinstance(base, dict):
        return {}
    keys = ("name", "task", "digest", "quantize")
    return {key: base[key] for key in keys if isinstance(base.get(key), str)}


def _check_base(
    model: nn.Module,
    name: str | None,
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
                expected=f"the base {made_on.get('name') or name}",
                mend="load that base; or pass allow_other_base=True if you know that they agree",
            )
        return
    own = known.facts().get("name")
    if name and own and _last(name) != _last(own):
        warnings.warn(
            f"{folder} was made for the base {name}, and this is {own}: its answers may be poor "
            "unless these are the same model",
            LoricaWarning,
            stacklevel=3,
        )


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()

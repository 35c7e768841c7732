"""What `lorica export` and `lorica convert` share: an adapter on its base, and its writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorica.attach.handle import Adapter
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.base.request import IMAGES
from lorica.cli.kinds import checked_kind
from lorica.cli.opening import adapter_facts, adapter_folder, configured_base
from lorica.errors import AdapterFileError, ConfigError, nearest
from lorica.files.adapter import load_adapter
from lorica.files.exports import ADAPTERS, MODELS, write_adapter


def check_format(name: str, dtype: str | None, *, models: bool) -> str:
    """The dtype to write in. Raises ConfigError where there is no such format, or dtype in it."""
    known = {**ADAPTERS, **(MODELS if models else {})}
    if name not in known:
        near = nearest(name, known)
        raise ConfigError(
            f"there is no format {name!r}",
            expected=f"one of: {', '.join(known)}",
            mend=f"did you mean {near}?" if near else None,
        )
    dtypes = known[name].dtypes
    if dtype is None:
        return dtypes[0]
    if dtype not in dtypes:
        raise ConfigError(
            f"the format {name} is not written in {dtype}", expected=f"one of: {', '.join(dtypes)}"
        )
    return dtype


def open_adapter(path: str, base: str | None, dtype: str = "as-stored") -> Adapter:
    """An adapter in any format, on its base.

    Args:
        path: a run, an adapter folder, or a file or folder of another tool.
        base: where the base is; needed where the files do not say it.

    Raises:
        AdapterFileError, BaseModelError: one of them cannot be read.
    """
    folder = adapter_folder(Path(path)) if Path(path).is_dir() else None
    source = folder or Path(path)
    if not source.exists():
        raise AdapterFileError(f"there is no {path}", mend="check the path")
    facts = adapter_facts(source) if folder else {}
    asked, known = facts.get("task") or {}, facts.get("base") or {}
    name = base or known.get("name") or (configured_base(source) if folder else None)
    if name is None:
        raise AdapterFileError(
            f"{path} does not say what its base is", mend="name the base with --model"
        )
    kind = asked.get("kind") or known.get("task") or checked_kind("auto", name)
    labels = tuple(asked.get("labels", ()))
    if kind == IMAGES and dtype == "as-stored":  # its parts may differ
        dtype = "auto"
    model = load_model(
        name, task=kind, dtype=dtype, labels=labels, eos_token=asked.get("eos_token"), device="cpu"
    )
    return load_adapter(model, source)


def written(
    adapter: Adapter, name: str, output: Path, dtype: str, overwrite: bool, as_json: bool
) -> None:
    """Write an adapter, and say what was written."""
    tokenizer = getattr(base_of(adapter.model), "tokenizer", None)
    notes = write_adapter(adapter, name, output, dtype, overwrite=overwrite, tokenizer=tokenizer)
    tell(name, output, dtype, notes, as_json)


def tell(name: str, output: Path, dtype: str, notes: list[str], as_json: bool) -> None:
    """What was written, as lines or as one object."""
    facts: dict[str, Any] = {"path": str(output), "format": name, "dtype": dtype, "notes": notes}
    if as_json:
        print(json.dumps(facts))
        return
    for note in notes:
        print(f"note    {note}")
    print(f"{name}  {output}")

"""What a command is given: a run folder, an adapter folder or a base model. It opens any of the three."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter
from lorica.base.load import EMBEDDED, base_of, load_model
from lorica.errors import AdapterFileError, ConfigError
from lorica.files.peft import load_adapter
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.task import Task


@dataclass
class Subject:
    """A model that is ready to answer.

    Attributes:
        name: what the user gave.
        model: with the adapter attached and active, where there is one.
        adapter: its handle; None for a bare base.
        task: asks the model as it was asked in training.
    """

    name: str
    model: nn.Module
    adapter: Adapter | None
    task: Task


def open_subject(
    path: str,
    *,
    base: str | None = None,
    task: str = "causal-lm",
    dtype: str = "auto",
    max_new_tokens: int = 128,
    allow_other_base: bool = False,
) -> Subject:
    """Open a run, an adapter or a base.

    Args:
        path: a run folder, an adapter folder, or a base: a folder or a hub id.
        base: for an adapter, another place of its base.
        task: of a bare base. An adapter knows its own.

    Raises:
        AdapterFileError, BaseModelError: what is there cannot be opened.
    """
    folder = adapter_folder(Path(path))
    if folder is None:
        if base is not None:
            raise ConfigError(f"--model goes with an adapter, but {path} is none")
        model = load_model(path, task=task, dtype=dtype)
        return Subject(path, model, None, _task(model, {}, max_new_tokens))
    facts = adapter_facts(folder)
    asked = facts.get("task") if isinstance(facts.get("task"), dict) else {}
    known = facts.get("base", {})
    name = base or known.get("name") or _configured_base(folder)
    kind = asked.get("kind") or known.get("task") or task
    model = load_model(name, task=kind, dtype=dtype, labels=tuple(asked.get("labels", ())))
    adapter = load_adapter(model, folder, allow_other_base=allow_other_base)
    activate(model, adapter)
    return Subject(path, model, adapter, _task(model, asked, max_new_tokens))


def adapter_folder(path: Path) -> Path | None:
    """The adapter in a run folder or an adapter folder; None where there is neither.

    Raises:
        AdapterFileError: a run that has no adapter yet, or several.
    """
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "run.json").is_file():
        if (path / "adapter" / "adapter_config.json").is_file():
            return path / "adapter"
        several = sorted(p.parent.name for p in path.glob("adapters/*/adapter_config.json"))
        raise AdapterFileError(
            f"the run {path} holds no single adapter",
            mend=f"name one of {path}/adapters: {', '.join(several)}"
            if several
            else "let the run finish: lorica train --resume",
        )
    return None


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What Lorica noted beside an adapter; empty for an adapter of another tool."""
    file = folder / "lorica.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _configured_base(folder: Path) -> str:
    name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not name:
        raise AdapterFileError(
            f"{folder} does not say what its base is", mend="name the base with --model"
        )
    return EMBEDDED.name if name == "embedded" else name


def _task(model: nn.Module, facts: dict[str, Any], max_new_tokens: int) -> Task:
    """The task of a loaded model, asked as the facts of its adapter say."""
    base = base_of(model)
    assert base is not None
    max_length = facts.get("max_length")
    if base.task == "text-classification":
        return TextClassification(base.tokenizer, base.labels, max_length)
    if base.task == "seq2seq":
        return Seq2Seq(base.tokenizer, max_length, max_new_tokens)
    return CausalLM.of(
        base.tokenizer,
        max_length=max_length,
        train_on=facts.get("train_on", "completion"),
        add_bos=facts.get("add_bos"),
        separator=facts.get("separator", ""),
        max_new_tokens=max_new_tokens,
    )

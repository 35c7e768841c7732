"""Opens what a command is given: a run folder, an adapter folder or a base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.activate import Mixture, Stack, activate
from lorica.attach.handle import Adapter
from lorica.base.digest import digest_of_files
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.base.locate import weight_files
from lorica.cli.kinds import checked_kind, names_classes, refuse_pictures
from lorica.cli.material import class_names
from lorica.config import load_yaml
from lorica.data.dataset import Dataset
from lorica.data.encode import separator_of
from lorica.errors import AdapterFileError, BaseModelError, ConfigError
from lorica.files.adapter import load_adapter
from lorica.files.doubts import doubts
from lorica.records.folder import how_to_resume
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.task import Task, num_positions


@dataclass
class Subject:
    """A model that is ready to answer.

    Attributes:
        name: what the user gave.
        model: with the adapter attached and active, where there is one.
        adapter: its handle; None for a bare base.
        task: asks the model as it was asked in training.
        format: of the records of its training ("chat", "prompt" ...); None where that is not known.
        system: the system message of its training; None without one.
        notes: what the user should be told of how it is asked.
        mixture: what answers: the adapter, alone or together with others.
    """

    name: str
    model: nn.Module
    adapter: Adapter | None
    task: Task
    format: str | None = None
    system: str | None = None
    notes: list[str] = field(default_factory=list)
    mixture: Mixture | Stack = None

    def __post_init__(self) -> None:
        self.mixture = self.mixture or self.adapter


def open_subject(
    path: str,
    *,
    base: str | None = None,
    task: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 128,
    records: Dataset | None = None,
) -> Subject:
    """Open a run, an adapter or a base.

    Args:
        path: a run folder, an adapter folder, or a base: a folder or a hub id.
        base: for an adapter, another place of its base.
        task: of a bare base; auto: as its config suggests. An adapter knows its own.
        records: those that will be asked. They name the classes, and say what parts prompt and
            completion, where nothing beside the model does.

    Raises:
        AdapterFileError, BaseModelError: what is there cannot be opened.
    """
    folder = adapter_folder(Path(path))
    if folder is None:
        if base is not None:
            raise ConfigError(f"--model goes with an adapter, but {path} is none")
        kind = checked_kind(task, path)
        refuse_pictures(kind, path)
        bare = records and kind == "text-classification" and not names_classes(path)
        labels = class_names(records) if records and bare else ()
        model = load_model(path, task=kind, dtype=dtype, labels=labels)
        facts = adapter_facts(Path(path))  # of a model that an adapter was merged into
        asked, format, system = (facts.get(key) for key in ("task", "format", "system"))
        asked, notes = _parted(_object(asked), kind, records)
        own = task_of(model, asked, max_new_tokens)
        return Subject(path, model, None, own, format, system, notes)
    facts = adapter_facts(folder)
    asked, known = (_object(facts.get(key)) for key in ("task", "base"))
    name = base or known.get("name") or configured_base(folder)
    with _fitting(name, folder, known, recorded=base is None):
        kind = asked.get("kind") or known.get("task") or checked_kind(task, name)
        refuse_pictures(kind, name)
        model = load_model(
            name,
            task=kind,
            dtype=dtype,
            labels=tuple(asked.get("labels", ())),
            eos_token=asked.get("eos_token"),
            quantize=known.get("quantize"),
        )
    _take_template(model, folder)
    adapter = load_adapter(model, folder)
    activate(model, adapter)
    asked, notes = _parted(asked, kind, records)
    run = folder.parent
    return Subject(
        path,
        model,
        adapter,
        task_of(model, asked, max_new_tokens),
        _object(_object(_json(run / "run.json").get("data")).get("train")).get("format"),
        load_yaml(run / "config.yaml").values.get("system")
        if (run / "config.yaml").is_file()
        else None,
        [*notes, *(f"adapter: {doubt}" for doubt in doubts(adapter))],
    )


def _parted(
    facts: dict[str, Any], kind: str, records: Dataset | None
) -> tuple[dict[str, Any], list[str]]:
    """The facts with what a training on these records would put between prompt and completion,
    where they do not say it; and what to tell of that.
    """
    prompts = records is not None and records.format == "prompt"
    if "separator" in facts or kind != "causal-lm" or records is None or not prompts:
        return facts, []
    separator = separator_of(records.rows)
    told = "no white space in the records parts prompt and completion"
    notes = [f"separator: {separator!r}, as in a training on these records; {told}"]
    return {**facts, "separator": separator}, notes if separator else []


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
            else f"let the run finish: {how_to_resume(path)}",
        )
    return None


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What Lorica noted beside an adapter or a merged model; empty for those of other tools."""
    return _json(folder / "lorica.json")


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file, or something else in it."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return _object(found)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@contextmanager
def _fitting(name: str, folder: Path, known: dict[str, Any], *, recorded: bool) -> Iterator[None]:
    """Say of a base that cannot be loaded for an adapter that it is another one, or where its name
    comes from.

    Args:
        known: what is noted of the adapter's base.
        recorded: the name stands beside the adapter; it was not given.
    """
    try:
        yield
    except BaseModelError as error:
        if not known.get("quantize") and _has_other_weights(name, known.get("digest")):
            raise AdapterFileError(
                f"{folder} was made for another base than {name}: the weights differ",
                expected=f"the base {known.get('name')}",
                mend="name that base with --model",
            ) from error
        if not recorded:
            raise
        relative = not Path(name).is_absolute() and not Path(name).is_dir()
        how = ", a hub id or a path relative to where it was trained," if relative else ""
        raise BaseModelError(
            f"{folder} was trained on the base {name!r}{how} which cannot be loaded",
            problems=[error.what, *error.problems],
            expected="the base of the adapter",
            mend="name the folder of the base, or its hub id, with --model",
        ) from error


def _has_other_weights(name: str, digest: str | None) -> bool:
    """Whether a base is here, and is not the one of this digest."""
    try:
        files = weight_files(name)
    except (OSError, ValueError):  # neither a folder nor an id of the hub
        return False
    return bool(files and digest) and digest_of_files(files[0].parent) != digest


def _take_template(model: nn.Module, folder: Path) -> None:
    """The chat template beside an adapter is that of its training, and comes before the base's."""
    file, base = folder / "chat_template.jinja", base_of(model)
    if base is not None and file.is_file():
        base.tokenizer.chat_template = file.read_text(encoding="utf-8")


def configured_base(folder: Path) -> str:
    """The base that an adapter's own config names. Raises AdapterFileError where it names none."""
    name = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise AdapterFileError(
            f"{folder} does not say what its base is", mend="name the base with --model"
        )
    return str(name)


def task_of(model: nn.Module, facts: dict[str, Any], max_new_tokens: int) -> Task:
    """The task of a loaded model, asked as the facts of its adapter say."""
    base = base_of(model)
    assert base is not None
    max_length = facts.get("max_length") or num_positions(model)  # as training would cut
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

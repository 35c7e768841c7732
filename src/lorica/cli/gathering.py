"""Several adapters of one base, opened together; and a folder for what is made of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.empty import empty_model
from lorica.base.load import load_model
from lorica.cli.kinds import checked_kind
from lorica.cli.opening import adapter_facts, adapter_folder, configured_base, task_of
from lorica.errors import AdapterFileError, ConfigError, nearest
from lorica.files.adapter import digest_of, load_adapter, save_adapter
from lorica.files.folder import read_json
from lorica.tasks.task import Task

_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_BESIDE += ("chat_template.jinja",)
_OPTIONS = ("--output-dir", "--weights", "--method", "--r", "--density", "--seed", "--search")
_OPTIONS += ("--majority-sign-method", "--search-steps", "--model", "--overwrite", "--json")


@dataclass
class Group:
    """Adapters on one model.

    Attributes:
        folders: of the adapters.
        names: on the model, in the same order.
        model: the base; without its weights where nothing needs them.
        task: how it is asked; None without weights.
        facts: what is noted beside the first adapter.
    """

    folders: list[Path]
    names: list[str]
    model: nn.Module
    task: Task | None
    facts: dict[str, Any]
    adapters: list[Adapter]


def read_words(words: Sequence[str], weights: str | None) -> tuple[list[Path], list[float] | None]:
    """Folders and weights: `--weights 0.7 0.3` leaves all numbers but the first among the words.

    Raises:
        ConfigError: an unknown option, weights that are no numbers, or not as many as adapters.
    """
    numbers = [] if weights is None else [w for w in re.split(r"[,\s]+", weights) if w]
    folders = []
    for word in words:
        if _is_number(word) and not Path(word).exists():
            numbers.append(word)
        elif word.startswith("-"):
            near = nearest(word, _OPTIONS)
            raise ConfigError(
                f"there is no option {word}", mend=f"did you mean {near}?" if near else None
            )
        else:
            folders.append(Path(word))
    if wrong := [number for number in numbers if not _is_number(number)]:
        raise ConfigError(f"--weights holds {wrong[0]!r}, which is no number")
    if not folders or (numbers and len(numbers) != len(folders)) or (numbers and weights is None):
        raise ConfigError(
            f"there are {len(numbers)} weights for {len(folders)} adapters",
            expected="--weights with one number for each adapter",
        )
    return folders, [float(number) for number in numbers] or None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def gathered(paths: Sequence[Path], *, base: str | None, whole: bool = False) -> Group:
    """Open adapters on their base.

    Args:
        base: another place of it.
        whole: load the base's weights also where no method needs them.

    Raises:
        AdapterFileError: no adapter, adapters of different bases, or tensors that do not fit.
    """
    folders = [adapter_folder(path) or path for path in paths]
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise AdapterFileError(
                f"{folder} is neither a run nor an adapter folder",
                expected="a folder with run.json or adapter_config.json",
            )
    facts = [adapter_facts(folder) for folder in folders]
    _check_same_base(folders, facts)
    asked, known = facts[0].get("task") or {}, facts[0].get("base") or {}
    name = base or known.get("name") or configured_base(folders[0])
    kind = asked.get("kind") or known.get("task") or checked_kind("auto", name)
    labels = tuple(asked.get("labels", ()))
    if whole or any(_needs_weights(folder) for folder in folders):
        end = asked.get("eos_token")
        model = load_model(name, task=kind, dtype="as-stored", labels=labels, eos_token=end)
        task = task_of(model, asked, 128)
    else:
        model, task = empty_model(name, task=kind, labels=labels), None
    names = _names(paths)
    adapters = [load_adapter(model, f, name=n) for f, n in zip(folders, names, strict=True)]
    return Group(folders, names, model, task, facts[0], adapters)


def _needs_weights(folder: Path) -> bool:
    """Whether what an adapter does depends on the base's weights: all but plain LoRA may."""
    config = read_json(folder / "adapter_config.json")
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora")
    below = adapter_facts(folder).get("on")
    return not plain or bool(config.get("modules_to_save")) or bool(below)


def _check_same_base(folders: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    digests = [(fact.get("base") or {}).get("digest") for fact in facts]
    known = [(folder, digest) for folder, digest in zip(folders, digests, strict=True) if digest]
    other = [folder for folder, digest in known if digest != known[0][1]]
    if other:
        raise AdapterFileError(
            f"{other[0]} was made for another base than {known[0][0]}: the weights differ",
            expected="adapters of one base: their updates have no common meaning otherwise",
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each, after its folder."""
    found: list[str] = []
    for path in paths:
        own = path.parent.name if path.name == "adapter" else path.name
        name = re.sub(r"[^A-Za-z0-9._-]", "-", own).strip("-._")[:40] or "adapter"
        found.append(name if name not in found else f"{name}-{len(found) + 1}")
    return found


def save_made(
    group: Group,
    adapter: Adapter,
    folder: Path,
    facts: dict[str, Any],
    *,
    title: str,
    overwrite: bool = False,
) -> None:
    """Write what was made of a group, with a card that says of what."""
    adapter.base = dict(group.adapters[0].base)
    sources = [
        {"path": str(one.absolute()), "digest": digest_of(one), "name": name}
        for one, name in zip(group.folders, group.names, strict=True)
    ]
    kept = {key: group.facts[key] for key in ("task",) if key in group.facts}
    made = {key: value for key, value in facts.items() if key != "places"}
    card = _card(adapter, group, title)
    noted = {**kept, "mix_of": sources, "mix": made}
    save_adapter(adapter, folder, model_card=card, provenance=noted, overwrite=overwrite)
    for name in _BESIDE:
        if (group.folders[0] / name).is_file():
            shutil.copyfile(group.folders[0] / name, folder / name)
    (folder / "mix_report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _card(adapter: Adapter, group: Group, title: str) -> str:
    base = adapter.base.get("name")
    head = ["---", "library_name: peft", "tags:", "- lora", "- lorica", "- merge"]
    head += [f"base_model: {json.dumps(base)}"] if base else []
    listed = [f"- `{folder}`" for folder in group.folders]
    return "\n".join(
        [
            *head,
            "---",
            "",
            "# LoRA adapter, made of others",
            "",
            f"{title}.",
            "",
            "It was made of:",
            "",
            *listed,
            "",
            "```python",
            "from peft import PeftModel",
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
            "```",
            "",
        ]
    )

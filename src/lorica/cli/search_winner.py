"""The chosen candidate of a search as an adapter folder, and the settings that train it again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.cli.anchoring import anchored
from lorica.cli.encoding import own_template
from lorica.cli.opening import adapter_facts
from lorica.cli.prepared import Prepared
from lorica.cli.start import ADAPTER
from lorica.config import Resolved
from lorica.errors import AdapterFileError
from lorica.files.adapter import CONFIG
from lorica.files.folder import new_folder
from lorica.records.atomic import write_file
from lorica.records.card import write_card
from lorica.records.folder import RUN_YAML, RunFolder
from lorica.search.entry import Entry


def write_winner(
    folder: RunFolder, entry: Entry, chosen: Resolved, prepared: Prepared, about: dict[str, Any]
) -> None:
    """Write adapter/ and run.yaml.

    Args:
        entry: the chosen candidate; of this run, or of one whose folder can be read from here.
        chosen: its settings.
        prepared: the search, for tokenizer and chat template.
        about: run.json.

    Raises:
        AdapterFileError: the candidate was trained on a machine whose folder is not here.
    """
    source = Path(entry.run) / "adapters" / entry.name
    if not source.is_dir():
        raise AdapterFileError(
            f"the chosen candidate {entry.name} was trained in {entry.run}, which is not here",
            mend="run lorica search --resume on the machine that has it",
        )
    target = folder.adapter()
    with new_folder(target, marker=CONFIG, overwrite=True, error=AdapterFileError) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
    tokenizer = prepared.task.tokenizer
    if template := own_template(prepared):
        tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    run = chosen.run.model_copy(update={"output_dir": None, "search": None})
    alone = anchored(replace(chosen, run=run))
    write_file(folder.path / RUN_YAML, alone.to_yaml())
    facts = adapter_facts(target)
    own = about.get("adapters", {}).get(entry.name, {})
    card = {
        **about,
        "adapters": {ADAPTER: {**own, "path": str(target)}},
        "method": own.get("method", {}),
        "settings": facts.get("settings", {}),
    }
    write_card(target, card, adapter=ADAPTER)

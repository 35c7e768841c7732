"""Rows of data sets on the Hugging Face hub, by the optional package `datasets`."""

import os
from typing import Any

from lorica.data.locate import SPLIT_OF, HubId
from lorica.data.problems import Problems
from lorica.data.rows import check_rows
from lorica.data.table import Table, Wish
from lorica.errors import DataError, MissingPackage

_TRUE = ("1", "true", "yes", "on")


def offline() -> bool:
    """Whether the environment forbids the hub, by the names that Hugging Face uses."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in _TRUE for name in names)


def hub_tables(hub: HubId, limit: int | None) -> dict[str, Table]:
    """The splits train, valid and test of a data set on the hub; others are left out, and said so.

    Raises:
        MissingPackage: `datasets` is not installed.
        DataError: not found, not allowed, offline and not in the cache, or without usable splits.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage.of("datasets", "hub", f"reading {hub.id} from the hub") from error
    if offline() and not datasets.config.HF_HUB_OFFLINE:  # pyright: ignore
        raise DataError(
            f"{hub.id} is on the hub, and the environment was set to offline after Python started",
            mend="set HF_HUB_OFFLINE=1 before the start, so that the libraries see it",
        )
    try:
        # trust_remote_code is never passed: loading scripts are refused by the package itself
        loaded = datasets.load_dataset(
            hub.id,
            hub.config,
            revision=hub.revision,
            download_config=datasets.DownloadConfig(local_files_only=offline()),
        )
    except Exception as error:  # the package raises a dozen kinds, of several libraries
        where = "in the local cache" if offline() else "on the hub"
        raise DataError(
            f"{hub.id} cannot be read {where}: {type(error).__name__}: {str(error)[:200]}",
            expected="a file, a folder, or a hub id org/name[:config][@revision]",
            mend="HF_HUB_OFFLINE is set: unset it, or download the data set first"
            if offline()
            else "check the name and the network, and huggingface-cli login for private data",
        ) from error
    return tables_of(loaded, hub.id, limit)


def tables_of(loaded: Any, name: str, limit: int | None) -> dict[str, Table]:
    """One table per split of a `datasets.DatasetDict`.

    Raises:
        DataError: no split is named train, valid or test (or a word for these), or bad rows.
    """
    tables: dict[str, Table] = {}
    for given, rows in loaded.items():
        split = SPLIT_OF.get(given.lower())
        if split is None or split in tables:
            continue
        problems = Problems()
        size = len(rows) if limit is None else min(limit, len(rows))
        tables[split] = check_rows(rows.select(range(size)).to_list(), name, problems, Wish(limit))
        if problems:
            raise problems.error(f"{name} {split}")
    if not tables:
        raise DataError(
            f"{name} has the splits {', '.join(loaded)}", expected="train, validation or test"
        )
    rest = [given for given in loaded if SPLIT_OF.get(given.lower()) not in tables]
    if rest:
        next(iter(tables.values())).notes.append(f"splits not read: {', '.join(rest)}")
    return tables

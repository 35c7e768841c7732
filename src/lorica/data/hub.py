"""Rows of data sets on the Hugging Face hub, by the optional package `datasets`."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

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
        import datasets.config
    except ImportError as error:
        raise MissingPackage.of("datasets", "hub", f"reading {hub.id} from the hub") from error
    if offline() and not datasets.config.HF_HUB_OFFLINE:
        raise DataError(
            f"{hub.id} is on the hub, and the environment was set to offline after Python started",
            mend="set HF_HUB_OFFLINE=1 before the start, so that the libraries see it",
        )
    _ask_once(hub, Path(datasets.config.HF_DATASETS_CACHE))
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


def _ask_once(hub: HubId, cache: Path) -> None:
    """Find out in seconds whether the hub has it: the package would ask for half a minute.

    Raises:
        DataError: it does not, or does not answer and the cache has nothing of it either.
    """
    if offline():
        return
    where = {"repo_type": "dataset", "revision": hub.revision}
    try:
        get_hf_file_metadata(
            hf_hub_url(hub.id, "README.md", **where), timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except GatedRepoError:  # one that is not found, by its class
        return
    except RepositoryNotFoundError as error:
        why = f"{constants.ENDPOINT} has no data set of that name, or none for your token"
        raise _nowhere(hub, why) from error
    except HfHubHTTPError:
        return  # the hub answered: the package says well what is wrong
    except Exception as error:  # of several libraries: no network, no answer
        if not (cache / hub.id.replace("/", "___")).exists():
            raise _nowhere(
                hub, f"{constants.ENDPOINT} did not answer: {str(error)[:120]}"
            ) from error


def _nowhere(hub: HubId, why: str) -> DataError:
    return DataError(
        f"{hub.id} is no file or folder here, and {why}",
        expected="a file, a folder, or a hub id org/name[:config][@revision]",
        mend="check the name and the network, and huggingface-cli login for private data",
    )


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

"""Whether a base that is no folder lies in the cache or on the hub: asked once, within seconds.

The libraries ask again and again for half a minute, for every file, before they give up on a name
that is mistyped or a network that is not there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from lorica.errors import BaseModelError, nearest


def hub_options(
    name: str | Path, revision: str = "main", file: str = "config.json"
) -> dict[str, Any]:
    """What to hand to transformers for a base: nothing for a folder, or for one that the hub has;
    `local_files_only` where the hub does not answer but the cache has it.

    Args:
        file: what every base of this kind has.

    Raises:
        BaseModelError: the name is neither a folder, nor in the cache, nor on the hub.
    """
    return {} if Path(name).expanduser().exists() else _asked(str(name), revision, file)


@cache
def _asked(name: str, revision: str, file: str) -> dict[str, Any]:
    """Likewise for what is no folder; asked once for each name that is there."""
    try:
        cached = isinstance(try_to_load_from_cache(name, file, revision=revision), str)
        url = hf_hub_url(name, file, revision=revision)
    except HFValidationError:
        raise _nowhere(name, "it is no possible hub id either") from None
    if constants.HF_HUB_OFFLINE:
        if cached:
            return {}
        raise _nowhere(name, "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub")
    try:
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError:  # one that is not found, by its class
        return {}
    except RepositoryNotFoundError:
        raise _nowhere(
            name, f"{constants.ENDPOINT} has none of that name, or none for your token"
        ) from None
    except HfHubHTTPError:
        return {}  # the hub answered: the library asks again, and says well what is wrong
    except Exception as error:  # of several libraries: no network, no answer
        if cached:
            return {"local_files_only": True}
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise _nowhere(
            name, f"it is not in the cache, and {constants.ENDPOINT} did not answer: {why[:120]}"
        ) from error
    return {}


def _nowhere(name: str, reason: str) -> BaseModelError:
    near = nearest_base(name)
    return BaseModelError(
        f"there is no base {name}: it is no folder here, and {reason}",
        expected="a folder with config.json, *.safetensors and a tokenizer; a hub id org/name; or "
        "embedded",
        mend=f"did you mean {near}?" if near else "check the path; for a hub id also the network",
    )


def nearest_base(name: str) -> str | None:
    """The base on this machine that a mistyped name is near to, by all of it or its last part."""
    known = {base: base for base in _bases_here(name)}
    known |= {base.rpartition("/")[2]: base for base in reversed(known)}
    near = nearest(name, known) or nearest(name.rpartition("/")[2], known)
    return known[near] if near else None


def _bases_here(name: str) -> list[str]:
    """Folders beside the name and here, what the hub's cache holds, and what travels with us."""
    beside = Path(name).expanduser().parent
    folders = [
        str(config.parent)
        for place in dict.fromkeys((beside, Path()))
        if place.is_dir()
        for config in sorted(place.glob("*/config.json"))
    ]
    stored = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    return [*folders, *(entry.name[8:].replace("--", "/") for entry in stored), "embedded"]

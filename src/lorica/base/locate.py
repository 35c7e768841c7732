"""Where a base lies: in the package, in a folder, or in the hub's cache on this machine."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.hub import cached_file

EMBEDDED = Path(__file__).parent / "embedded"
"""The small language model that travels with the package; `load_model("embedded")`."""


def located(name: str | Path) -> str | Path:
    """The embedded model's folder, a folder with ~ resolved, or the hub id as it is."""
    if str(name) == "embedded":
        return EMBEDDED
    return Path(name).expanduser() if str(name).startswith("~") else name


def lasting_name(name: str | Path, path: str | Path) -> str:
    """What names the base from everywhere: a relative path would be another folder elsewhere, or
    even a stranger's model on the hub.
    """
    folder = Path(path)
    return str(folder.absolute()) if path is not EMBEDDED and folder.is_dir() else str(name)


def weight_files(name: str | Path, *, revision: str = "main") -> list[Path]:
    """The weight files of a base on this machine; none where it must be fetched first."""
    folder = weights_folder(located(name), revision)
    return sorted(folder.glob("*.safetensors")) if folder else []


def weights_folder(path: str | Path, revision: str) -> Path | None:
    """Where the weight files lie: the folder itself, or the hub's copy of them on this machine."""
    if Path(path).is_dir():
        return Path(path)
    config = cached_file(
        str(path),
        "config.json",
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(config).parent if config else None

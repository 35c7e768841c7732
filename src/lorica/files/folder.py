"""Folders that appear whole or not at all, and files of strangers that are opened with care."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorica.errors import AdapterFileError, LoricaError
from lorica.records.atomic import exchange, sync_file, sync_folder, temporary_beside

MAX_JSON_BYTES = 64 * 1024


@contextlib.contextmanager
def new_folder(
    folder: str | Path, *, marker: str, overwrite: bool, error: type[LoricaError]
) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder` when the block ends well.

    A reader, or a crash, sees the old folder or the new one, never a mixture; where the system
    cannot exchange two names in one step, for an instant none. Files get mode 0644, whatever the
    writer chose, and are on the disk before the name changes.

    Args:
        marker: the file that makes a folder one of this kind; only such a folder is ever replaced.
        overwrite: whether an existing folder may be replaced.
        error: the exception raised when it may not.
    """
    target = Path(folder).absolute()
    _check_target(target, marker, overwrite, error)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary.mkdir(mode=0o755)
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            if path.is_dir():
                path.chmod(0o755)
                sync_folder(path)
            else:
                path.chmod(0o644)
                sync_file(path)
        temporary.chmod(0o755)
        sync_folder(temporary)
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _check_target(target: Path, marker: str, overwrite: bool, error: type[LoricaError]) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise error(f"{target} is not a folder", mend="choose another name")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise error(f"{target} exists already", mend="choose another name, or pass overwrite=True")
    if not (target / marker).exists():
        raise error(
            f"{target} holds other things (there is no {marker} in it), so it is not replaced",
            mend="choose another name, or remove it yourself",
        )


def _swap(temporary: Path, target: Path) -> None:
    """Put the finished folder in place; what was there goes."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if exchange(temporary, target):
        aside = temporary
    else:
        aside = target.with_name(temporary.name.replace(".tmp-", ".old-", 1))
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
    with contextlib.suppress(OSError):  # the old one may go only when the new one is sure to stay
        sync_folder(target.parent)
        shutil.rmtree(aside, ignore_errors=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading: no device, no FIFO (which would hang), no way out of its
    folder.

    Links are followed in one case: those of a Hugging Face cache, from `snapshots/REVISION/` into
        the
    `blobs/` beside it.

    Raises:
        AdapterFileError: the path is missing, or is anything else.
    """
    if path.is_symlink():
        path = _cached(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterFileError(f"{path} does not exist") from error
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFileError(f"{path} is not a regular file", mend="copy the file itself here")
    return os.fdopen(descriptor, "rb")


def _cached(link: Path) -> Path:
    """Where a link of a Hugging Face cache leads; every other link is refused."""
    try:
        folder, real = link.parent.resolve(), link.resolve()
    except (OSError, RuntimeError) as error:  # a loop; or it became a file while it was looked at
        raise AdapterFileError(f"{link} is a link that leads nowhere") from error
    blobs = folder.parent.parent / "blobs"
    if real.parent == folder or (folder.parent.name == "snapshots" and real.parent == blobs):
        return real
    raise AdapterFileError(
        f"{link} is a link that leads out of its folder", mend="copy the file itself here"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a stranger: at most 64 KiB, no key twice, no NaN.

    Raises:
        AdapterFileError: anything else, with the place in the file.
    """
    with open_regular(path) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise AdapterFileError(f"{path} is larger than {MAX_JSON_BYTES // 1024} KiB")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`. Raises AdapterFileError as `read_json` does."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise AdapterFileError(f"{where} is no proper JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{where} holds no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


@contextlib.contextmanager
def new_file(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary name to write a file under, which becomes `path` when the block ends well.

    Raises:
        AdapterFileError: something is there already, and may not be replaced.
    """
    target = Path(path).absolute()
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise AdapterFileError(f"{target} is not a file", mend="choose another name")
    if target.exists() and not overwrite:
        raise AdapterFileError(
            f"{target} exists already", mend="choose another name, or replace it: --overwrite"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        yield temporary
        temporary.chmod(0o644)
        sync_file(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)

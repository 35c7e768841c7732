"""Files appear whole or not at all: a temporary name beside the target, fsync, rename, fsync of the
folder.
"""

import os
import secrets
from pathlib import Path


def write_file(path: str | Path, data: bytes | str, *, mode: int = 0o644) -> Path:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one, never
    a part.

    The mode is set here and not left to the umask, because some writers leave files unreadable for
    others.
    """
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name[:100]}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def sync_file(path: str | Path) -> None:
    """fsync a file that another library wrote."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """fsync a folder, so that a rename inside it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files appear whole or not at all: a temporary name beside the target, fsync, rename, fsync of the
folder.

Every byte of a run goes through `os.open`, `os.write`, `os.fsync`, `os.rename`, `os.replace` and
`exchange` of this module, so that a test can let any one of these calls fail and see what is left.
"""

import ctypes
import errno
import os
import secrets
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a kernel or a file system answers that cannot exchange two names."""


def write_file(path: str | Path, data: bytes | str, *, mode: int = 0o644) -> Path:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one, never
    a part.

    The mode is set here and not left to the umask, because some writers leave files unreadable for
    others.
    """
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    temporary = temporary_beside(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            os.fchmod(descriptor, mode)
            rest = memoryview(raw)
            while rest:  # a disk that fills up takes a part, and only then refuses
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def temporary_beside(target: Path) -> Path:
    """A name in the same folder for what is not finished yet: hidden, and no longer than a file
    system takes, in whatever script the target's is written.
    """
    stem = os.fsencode(target.name)[:100].decode("utf-8", "ignore")
    return target.with_name(f".tmp-{secrets.token_hex(4)}-{stem}")


def exchange(new: Path, old: Path) -> bool:
    """Swap the names of two files or folders in one step, so that `old` is never absent.

    Returns:
        False where the system has no such step; nothing happened then.

    Raises:
        OSError: the system has it, and it failed; nothing happened then either.
    """
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:  # a C library from before 2018
        return False
    names = os.fsencode(new), os.fsencode(old)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(new), None, str(old))


def sync_file(path: str | Path) -> None:
    """fsync a file that another library wrote."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: str | Path) -> None:
    """fsync a folder, so that a rename inside it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

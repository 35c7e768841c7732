"""Bytes from a path: regular files only, sizes checked, changes noticed, byte order marks read."""

import codecs
import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorica.errors import DataError

MAX_ROW_BYTES = 16 * 2**20
MAX_WHOLE_FILE = (
    2 * 2**30
)  # for kinds that are decoded in one piece; JSONL and Parquet are streamed

_BOMS = (  # UTF-32 first: its little-endian mark begins with the one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"PK\x03\x04", "zip"),
)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading and refuse every other kind without blocking on it.

    Raises:
        DataError: missing, not readable, a FIFO, device, socket or folder, a loop of links, packed,
            or changed while it was open.
    """
    try:
        # a FIFO would block in open() until somebody writes
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise DataError(
            f"{path}: {_reason(error)}", mend="give the path of a readable file"
        ) from error
    before = os.fstat(descriptor)
    if not stat.S_ISREG(before.st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is {_kind(before.st_mode)}", expected="a regular file")
    with os.fdopen(descriptor, "rb") as file:
        head = file.peek(8)
        for magic, name in _PACKED:
            if head.startswith(magic):
                raise DataError(f"{path} is packed with {name}", mend="unpack it first")
        yield file
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(
                f"{path} was changed while it was being read",
                mend="read it again when it is complete",
            )


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "no such file"
    if error.errno == errno.ELOOP:
        return "a loop of symbolic links"
    return os.strerror(error.errno) if error.errno else str(error)


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "no regular file")


def bom_encoding(head: bytes) -> str | None:
    """The encoding that a byte order mark at the start names."""
    return next((encoding for mark, encoding in _BOMS if head.startswith(mark)), None)


def whole_text(file: BinaryIO, name: str) -> str:
    """Decode a file in one piece: UTF-8, or what its byte order mark says. Never guesses.

    Raises:
        DataError: too large for this kind of file, or bytes that are not of the encoding.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > MAX_WHOLE_FILE:
        raise DataError(
            f"{name} is larger than {MAX_WHOLE_FILE >> 30} GiB", mend="write it as JSONL or Parquet"
        )
    raw = file.read()
    encoding = bom_encoding(raw[:4]) or "utf-8"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line} is not {encoding.upper().removesuffix('-SIG')}: "
            f"byte 0x{raw[error.start]:02x} at byte {error.start:,}",
            expected="UTF-8, or UTF-16/32 with a byte order mark",
            mend=f"iconv -f LATIN1 -t UTF-8 {name}   # or whatever encoding it was written in"
            if encoding.startswith("utf-8")
            else "the file is cut off or damaged: write it again",
        ) from error


def as_utf8(file: BinaryIO, name: str) -> BinaryIO:
    """The same file as UTF-8 without a byte order mark, streamed where it already is UTF-8."""
    head = file.peek(4)[:4] if isinstance(file, io.BufferedReader) else file.read(4)
    if not isinstance(file, io.BufferedReader):
        file.seek(0)
    encoding = bom_encoding(head)
    if encoding is None:
        return file
    if encoding == "utf-8-sig":
        file.read(len(codecs.BOM_UTF8))
        return file
    return io.BytesIO(whole_text(file, name).encode("utf-8", "surrogatepass"))

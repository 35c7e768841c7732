"""Encoded records on disk, so that a second run on the same data does not tokenize them again.

An entry is found by a digest of everything that decides about it: the records and where they come
from (notes name places), the tokenizer, the settings of the encoding, and the source code of the
encoding itself, so that no version number can be forgotten. What is read back is what a fresh
encoding gives, list for list.

A file is the SHA-256 of the rest, then safetensors: every list of numbers flat, with its lengths
beside it. A file that does not hold what its digest says is no entry. Files are renamed into place,
so that a stop in the middle leaves none, and readable to their owner only, as they spell the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lorica.data.dataset import Dataset
from lorica.data.examples import Encoded, Example
from lorica.data.tokens import tokenizer_digest
from lorica.records.atomic import write_file

FEWEST_RECORDS = 2_000
"""Smaller sets are encoded within a moment."""

MOST_BYTES = 2 << 30
"""Of all entries together; those that were not used for the longest time make room."""

_STALE_SECONDS = 3600
_DIGEST_SIZE = hashlib.sha256().digest_size


def user_folder() -> Path:
    """Where the caches of this user belong (XDG Base Directory Specification)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return base / "lorica"


@dataclass(frozen=True)
class Encoding:
    """What decides about the numbers that records become.

    Attributes:
        settings: plain values, every one that the encoding reads.
        tokenizer: digest of it; None where it cannot be told: then nothing is kept.
        example: the class of what it makes.
        sources: the files of its code.
    """

    settings: Mapping[str, Any]
    tokenizer: str | None
    example: type[Example]
    sources: Sequence[Path]


def encoding_of(
    source: str, settings: Mapping[str, Any], tokenizer: Any, example: type[Example]
) -> Encoding:
    """The encoding whose code stands in `source` and in the files of `lorica.data`."""
    sources = [Path(source), *Path(__file__).parent.glob("*.py")]
    return Encoding(settings, tokenizer_digest(tokenizer), example, sources)


@dataclass(frozen=True)
class EncodedCache:
    """A folder of entries of at most `most_bytes` together."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def encoded(
        self, records: Dataset, encoding: Encoding, make: Callable[[], Encoded]
    ) -> tuple[Encoded, list[str]]:
        """What `make` makes of the records, from here where it is here; and what the user should
        be told of the cache. A folder that cannot be read or written is no error.
        """
        if len(records) < FEWEST_RECORDS or encoding.tokenizer is None:
            return make(), []
        file = self.folder / f"{_key(records, encoding)}.encoded"
        told: list[str] = []
        try:
            found = _read(file, encoding.example)
            return found, [f"{len(records):,} records were encoded earlier: {file}"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            told.append(f"{file} cannot be used, encoding anew: {_first_line(error)}")
        encoded = make()
        try:
            self._keep(file, encoded)
        except (OSError, OverflowError) as error:
            told.append(f"they cannot be kept in {self.folder}: {_first_line(error)}")
        return encoded, told

    def _keep(self, file: Path, encoded: Encoded) -> None:
        payload = _payload(encoded)
        size = len(payload) + _DIGEST_SIZE
        if size > self.most_bytes // 2:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(size)
        write_file(file, hashlib.sha256(payload).digest() + payload, mode=0o600)

    def _make_room(self, size: int) -> None:
        """Remove what a killed process left, and the oldest entries until `size` bytes fit."""
        entries, now = [], time.time()
        for path in self.folder.iterdir():
            facts = path.stat()
            if path.suffix != ".encoded":
                continue
            if path.name.startswith(".tmp-"):
                if now - facts.st_mtime > _STALE_SECONDS:
                    path.unlink(missing_ok=True)
                continue
            entries.append((facts.st_mtime, facts.st_size, path))
        total = sum(bytes_ for _, bytes_, _ in entries)
        for _, bytes_, path in sorted(entries):
            if total + size <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= bytes_


def _key(records: Dataset, encoding: Encoding) -> str:
    digest = hashlib.sha256()
    for file in sorted(encoding.sources):
        digest.update(file.read_bytes())
    parts = {
        "records": records.digest,
        "format": records.format,
        "settings": encoding.settings,
        "tokenizer": encoding.tokenizer,
        "example": encoding.example.__qualname__,
    }
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for name, line in records.origins:
        digest.update(f"{name}\0{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _payload(encoded: Encoded) -> bytes:
    """Raises OverflowError for numbers that are no ids."""
    examples = encoded.examples
    tensors: dict[str, np.ndarray] = {}
    for field in fields(examples[0]) if examples else ():
        values = [getattr(example, field.name) for example in examples]
        if _is_list(field):
            tensors[f"{field.name}.lengths"] = np.fromiter(map(len, values), np.int32)
            values = chain.from_iterable(values)
        tensors[field.name] = np.fromiter(values, np.int32)
    notes = json.dumps(encoded.notes).encode()
    tensors["notes"] = np.frombuffer(notes, np.uint8)
    return safetensors.numpy.save(tensors)


def _read(file: Path, kind: type[Example]) -> Encoded:
    """Raises OSError where it cannot be read, ValueError, KeyError or SafetensorError where it is
    damaged.
    """
    raw = memoryview(file.read_bytes())
    payload = bytes(raw[_DIGEST_SIZE:])
    if hashlib.sha256(payload).digest() != raw[:_DIGEST_SIZE]:
        raise ValueError("it is damaged")
    tensors = safetensors.numpy.load(payload)
    notes = json.loads(tensors.pop("notes").tobytes())
    columns = [_column(tensors, field) for field in fields(kind)] if tensors else []
    os.utime(file)  # used now: the last to be removed
    return Encoded([kind(*values) for values in zip(*columns, strict=True)], notes)


def _column(tensors: Mapping[str, np.ndarray], field: Any) -> Iterable[Any]:
    """One field of all examples."""
    values = tensors[field.name].tolist()
    if not _is_list(field):
        return values
    ends = accumulate(tensors[f"{field.name}.lengths"].tolist(), initial=0)
    wanted = tuple if "tuple" in str(field.type) else list
    return [wanted(values[start:end]) for start, end in pairwise(ends)]


def _is_list(field: Any) -> bool:
    return "list" in str(field.type) or "tuple" in str(field.type)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

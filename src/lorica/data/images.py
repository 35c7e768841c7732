"""Folders of pictures with captions: as `datasets`' ImageFolder has them, and as kohya's tools do.

    pictures/metadata.jsonl     {"file_name": "0001.png", "text": "a three"}
    pictures/0001.png           or, without metadata.jsonl, 0001.txt beside it with the caption

A record is {"image": path, "caption": text, "sha256": of the file}; the digest of a data set is
that of captions and files, wherever they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lorica.data.dataset import Dataset, digest_of
from lorica.data.problems import counted
from lorica.errors import DataError

FORMAT = "image"
METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = ("text", "caption", "prompt")
"""Columns of metadata.jsonl that hold the caption; the first that is there."""
MOST_PIXELS = 64_000_000
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}


def read_images(folder: str | Path) -> Dataset:
    """The pictures of one folder, in the order of metadata.jsonl or of their names.

    Raises:
        DataError: no folder, no pictures, a picture without caption or a caption without picture;
            all of them in one error.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(
            f"{folder} is no folder of pictures",
            expected=f"a folder of {', '.join(SUFFIXES)} with {METADATA}, or a .txt beside each",
        )
    problems: list[str] = []
    named = (path / METADATA).is_file()
    pairs = _from_metadata(path, problems) if named else _from_texts(path, problems)
    rows, origins = [], []
    for file, caption, origin in pairs:
        data = file.read_bytes()
        rows.append(
            {"image": str(file), "caption": caption, "sha256": hashlib.sha256(data).hexdigest()}
        )
        origins.append(origin)
    if not rows and not problems:
        problems.append(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    if problems:
        raise DataError(
            f"{path} cannot be read as pictures with captions",
            problems=problems[:10],
            expected=f'{METADATA} with lines {{"file_name": ..., "text": ...}}, or a .txt beside '
            "each picture",
        )
    source = METADATA if named else "the .txt beside each"
    statement = f"{path}: {counted(len(rows), 'picture')}, captions of {source}"
    return image_dataset(rows, origins, statement)


def read_image_splits(folder: str | Path) -> dict[str, Dataset]:
    """The pictures of a folder, or of its folders train, valid (validation) and test."""
    path = Path(folder).expanduser()
    if not (path / "train").is_dir():
        return {"train": read_images(path)}
    return {
        split: read_images(path / name) for name, split in SPLITS.items() if (path / name).is_dir()
    }


def image_dataset(
    rows: list[dict[str, Any]], origins: list[tuple[str, int]], statement: str
) -> Dataset:
    """A data set of pictures; its digest does not depend on where they lie."""
    content = [{"caption": row["caption"], "sha256": row["sha256"]} for row in rows]
    return Dataset(rows, FORMAT, origins, statement, digest_of(content))


def chosen(dataset: Dataset, indices: Sequence[int], why: str) -> Dataset:
    """The pictures at `indices`; `why` is added to the statement."""
    return image_dataset(
        [dataset.rows[i] for i in indices],
        [dataset.origins[i] for i in indices],
        f"{dataset.statement}; {why}",
    )


def _from_metadata(
    folder: Path, problems: list[str]
) -> Iterator[tuple[Path, str, tuple[str, int]]]:
    file, root = folder / METADATA, folder.resolve()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        where, name = f"{METADATA}:{number}", row.get("file_name") if type(row) is dict else None
        if not isinstance(row, dict) or not isinstance(name, str):
            problems.append(f"{where}: no JSON object with file_name")
            continue
        caption = next((row[key] for key in CAPTIONS if isinstance(row.get(key), str)), None)
        picture = (folder / name).resolve()
        if caption is None:
            problems.append(f"{where}: no caption ({', '.join(CAPTIONS)})")
        elif not picture.is_relative_to(root):
            problems.append(f"{where}: {name} lies outside of the folder")
        elif not picture.is_file():
            problems.append(f"{where}: there is no picture {name}")
        else:
            yield picture, caption.strip(), (str(file), number)


def _from_texts(folder: Path, problems: list[str]) -> Iterator[tuple[Path, str, tuple[str, int]]]:
    for picture in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        text = picture.with_suffix(".txt")
        if text.is_file():
            yield picture.resolve(), text.read_text(encoding="utf-8").strip(), (str(text), 1)
        else:
            problems.append(f"{picture.name}: there is no {text.name} beside it")


def pixels_of(file: str | Path, resolution: int, channels: int) -> np.ndarray:
    """A picture as numbers from -1 to 1 (channels, resolution, resolution), float32: its shorter
    side resized to `resolution`, then the square in the middle.

    Args:
        channels: 3 for colours, 1 for grey.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "BMP")) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"{file} has {width:,} x {height:,} pixels",
                    expected=f"at most {MOST_PIXELS:,} in all",
                )
            upright = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error
    square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.LANCZOS)
    numbers = np.asarray(square, dtype=np.float32) / 127.5 - 1
    return numbers.reshape(resolution, resolution, channels).transpose(2, 0, 1)

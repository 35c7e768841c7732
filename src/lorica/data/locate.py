"""From what the user typed to files: a file, a folder (of splits), `-`, a hub id, `path#500`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lorica.data.problems import show
from lorica.data.rows import READERS
from lorica.errors import DataError, nearest

SPLITS = {  # our name -> what files and folders are called
    "train": ("train", "training", "trainset"),
    "valid": ("valid", "validation", "val", "dev", "devset", "eval", "evaluation"),
    "test": ("test", "testing", "testset"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
_NO_DATA = ("readme", "license", "licence", "notice", "source", "copying", "requirements")
_HUB_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubId:
    """`org/name[:config][@revision]`"""

    id: str
    config: str | None
    revision: str | None


@dataclass(frozen=True)
class Located:
    """Where the rows are.

    Attributes:
        name: what the user typed, without the suffix.
        groups: split -> groups of files, best first ("" where the input has no splits). A later
            group is read only where the files of the earlier ones have no targets.
        standard_input, hub: the other places.
        sample: the number behind `#`.
        notes: files that were left out.
    """

    name: str
    groups: dict[str, list[list[Path]]]
    standard_input: bool = False
    hub: HubId | None = None
    sample: int | None = None
    notes: tuple[str, ...] = ()


def locate(path: str | Path) -> Located:
    """Find the files that `path` means.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    name, sample = _split_sample(str(path))
    if not name or "\0" in name:
        raise DataError("the path of the data is empty, or holds a NUL character")
    if name == "-":
        return Located("standard input", {}, standard_input=True, sample=sample)
    file = _expanded(name)
    if file.is_dir():
        groups, notes = _folder(file)
        return Located(name, groups, sample=sample, notes=notes)
    if os.path.lexists(file):
        return Located(name, {"": [[file]]}, sample=sample)
    return Located(name, {}, hub=_hub_id(name, file), sample=sample)


def _expanded(name: str) -> Path:
    """The path with ~ resolved, where the system can hold such a name at all."""
    try:
        file = Path(name).expanduser()
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return file
    except (OSError, ValueError, RuntimeError) as error:  # too long, half a surrogate, no home
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{show(name)} can be no path: {why}") from error
    return file


def _split_sample(text: str) -> tuple[str, int | None]:
    head, mark, count = text.rpartition("#")
    if not mark or os.path.lexists(text):
        return text, None
    if not re.fullmatch(r"[1-9]\d{0,11}", count):
        raise DataError(f"{text}: {count!r} behind # is no number of rows", expected="such as #500")
    return head, int(count)


def _hub_id(name: str, file: Path) -> HubId:
    """A hub id, unless the text rather looks like a path that does not exist."""
    found = _HUB_ID.fullmatch(name)
    looks_local = file.suffix.lower() in READERS or (
        file.parent.is_dir() and file.parent != Path(".")
    )
    if found is None or looks_local:
        folder = file.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        close = nearest(file.name, names)
        raise DataError(
            f"{name}: no such file or folder",
            expected="a file, a folder, - for standard input, or a hub id such as org/name",
            mend=f"did you mean {folder / close}?" if close else None,
        )
    return HubId(found["id"], found["config"], found["revision"])


def _folder(folder: Path) -> tuple[dict[str, list[list[Path]]], tuple[str, ...]]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    _check_links(folder, entries)
    groups = _split_files(entries) or _split_folders(entries)
    if groups:
        used = {path for ranks in groups.values() for files in ranks for path in files}
        return groups, _left_out([e for e in entries if _readable(e)], used)
    files = [entry for entry in entries if _is_data(entry)]
    if files:
        return {"": [files]}, _left_out([e for e in entries if _readable(e)], set(files))
    folders = [entry for entry in entries if entry.is_dir()]
    if len(folders) == 1:  # the layout of the hub: everything in data/
        return _folder(folders[0])
    raise DataError(
        f"{folder} holds no data files",
        expected=f"files ending in {', '.join(READERS)}; or splits named train, valid, test",
        mend=f"it holds: {', '.join(e.name for e in entries[:10]) or 'nothing'}",
    )


def _check_links(folder: Path, entries: list[Path]) -> None:
    inside = folder.resolve()
    for entry in entries:
        if entry.is_symlink() and not _resolves_inside(entry, inside):
            raise DataError(
                f"{entry} is a symbolic link that leads out of the folder",
                mend="name its target itself, or copy it here",
            )


def _resolves_inside(entry: Path, inside: Path) -> bool:
    try:
        return entry.resolve(strict=True).is_relative_to(inside)
    except (OSError, RuntimeError):  # a dangling link; a loop (RuntimeError before Python 3.13)
        return False


def _readable(path: Path) -> bool:
    return path.suffix.lower() in READERS


def _words(stem: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", stem.lower()) if word]


def _is_data(path: Path) -> bool:
    return _readable(path) and not path.is_dir() and not {*_words(path.stem)} & {*_NO_DATA}


def _split_files(entries: list[Path]) -> dict[str, list[list[Path]]]:
    """Files named after splits, in ranks: `test.csv`, `test-00001-of-2.csv`, `my_test.csv`."""
    groups: dict[str, list[list[Path]]] = {}
    for entry in filter(_is_data, entries):
        words = _words(entry.stem)
        splits = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
        if len(splits) != 1:
            continue
        exact = entry.stem.lower() in SPLIT_OF
        shard = words[0] in SPLIT_OF and set(words[1:]) <= {"of"}
        ranks = groups.setdefault(splits.pop(), [[], [], []])
        ranks[0 if exact else 1 if shard else 2].append(entry)
    return {split: _of_one_kind(ranks) for split, ranks in groups.items()}


def _of_one_kind(ranks: list[list[Path]]) -> list[list[Path]]:
    """The ranks that have files, without files of another kind than the best of them."""
    best = next(rank for rank in ranks if rank)
    same = [[path for path in rank if path.suffix == best[0].suffix] for rank in ranks]
    return [rank for rank in same if rank]


def _split_folders(entries: list[Path]) -> dict[str, list[list[Path]]]:
    groups: dict[str, list[list[Path]]] = {}
    for entry in entries:
        split = SPLIT_OF.get(entry.name.lower())
        if split and entry.is_dir():
            files = sorted(path for path in entry.iterdir() if _is_data(path))
            _check_links(entry, files)
            if not files:
                raise DataError(f"{entry} holds no data files", expected=f"{', '.join(READERS)}")
            groups.setdefault(split, [[]])[0].extend(files)
    return groups


def _left_out(readable: list[Path], used: set[Path]) -> tuple[str, ...]:
    names = [path.name for path in readable if path not in used]
    if not names:
        return ()
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (f"not read: {', '.join(names[:8])}{more}",)

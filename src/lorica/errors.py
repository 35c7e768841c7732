"""The exceptions of Lorica. Every one says what happened, what was expected and how to mend it.

LoricaError                  1   (the exit code)
├── ConfigError              2   a setting is unknown, of a wrong type, out of range or in vain
├── DataError                2   a record, a file or a template cannot be used
├── TargetError              2   a target matched nothing, or a module cannot carry the adapter
├── ActivationError          1   an activation that the model in hand cannot serve
├── AdapterFileError         2   an adapter folder is missing, malformed, hostile or of another base
├── BaseModelError           2   a base model cannot be loaded or does not fit
├── MergeError               1   an adapter cannot become a weight, or the damage is too large
├── CheckRefused             3   a check found something that cannot work
├── CheckpointError          1   a checkpoint is missing, torn or of another run
├── RunLocked                1   another process holds the run folder
├── TrainingError            1   training cannot go on
│   ├── NonFiniteError       1   a loss or a gradient is NaN or infinite
│   └── OutOfMemory          1   a step, an evaluation or a load did not fit into memory
├── Interrupted              130 stopped by the user, resumable
└── MissingPackage           2   an optional package is needed; the message is the install command
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import ClassVar


class LoricaError(Exception):
    """A problem that the user can mend.

    Args:
        what: what happened, in one sentence.
        expected: what was expected instead.
        mend: what to do now.
        problems: the single problems where one input has several; all of them are shown.

    Attributes:
        shared: whether processes that were started together all have it, as far as is known.
    """

    exit_code: ClassVar[int] = 1
    shared: bool = True

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        mend: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.what, self.expected, self.mend = what, expected, mend
        self.problems = tuple(problems)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  - {problem}" for problem in self.problems]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:  # keyword arguments would be lost by the default
        return _rebuild, (type(self), self.what, self.expected, self.mend, self.problems)


def _rebuild(
    kind: type[LoricaError], what: str, expected: str, mend: str, problems: tuple
) -> LoricaError:
    return kind(what, expected=expected, mend=mend, problems=problems)


class ConfigError(LoricaError):
    """A setting is unknown, of the wrong type, out of range or without effect."""

    exit_code = 2


class DataError(LoricaError):
    """A record, a file or a template cannot be used."""

    exit_code = 2


class TargetError(LoricaError):
    """A target matched nothing, or a module cannot carry the adapter."""

    exit_code = 2


class ActivationError(LoricaError):
    """An activation that the model in hand cannot serve."""


class AdapterFileError(LoricaError):
    """An adapter folder is missing, malformed, hostile or made for another base."""

    exit_code = 2


class BaseModelError(LoricaError):
    """A base model cannot be loaded or does not fit."""

    exit_code = 2


class MergeError(LoricaError):
    """An adapter cannot become a weight, or the damage of rounding is too large."""


class CheckRefused(LoricaError):
    """A check found something that cannot work."""

    exit_code = 3


class CheckpointError(LoricaError):
    """A checkpoint is missing, torn or belongs to another run."""


class RunLocked(LoricaError):
    """Another process holds the run folder."""


class TrainingError(LoricaError):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite; the last good state is kept.

    Attributes:
        rows: records that may be the cause, as indices into those of the adapter.
        adapter: its name; where several failed, the first of them.
        failed, steps: where all adapters of a run failed, what ended each, and at which step.
    """

    rows: Sequence[int] = ()
    adapter: str = ""
    failed: Mapping[str, str] = MappingProxyType({})
    steps: Mapping[str, int] = MappingProxyType({})


class OutOfMemory(TrainingError):
    """Something did not fit into memory; the message has what to lower, with numbers."""


class Interrupted(LoricaError):
    """Stopped by the user or the system; the run can be resumed.

    Attributes:
        together: whether all processes of a run stop at the same step, each with its state saved.
    """

    exit_code = 130
    together: bool = False


class MissingPackage(LoricaError):
    """An optional package is needed."""

    exit_code = 2

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> "MissingPackage":
        return cls(f"{purpose} needs the package {package}", mend=f"pip install 'lorica[{extra}]'")


class LoricaWarning(UserWarning):
    """Something that works, but probably not as the user thinks."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory ran out, on the processor or a GPU. torch has several ways to
    say so, and one of them is only in the words.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(w in str(error) for w in words)


def folded(problems: Iterable[tuple[str, str]]) -> list[str]:
    """What is wrong in places, as lines: one for all places of a shape where that is the same, with
    the first of them and what the others are called.

    Args:
        problems: ("PATH" or "PATH (SHAPE)", what is wrong there).
    """
    places: dict[tuple[str, str], list[str]] = {}
    for place, problem in problems:
        path, _, shape = place.partition(" ")
        places.setdefault((f" {shape}".rstrip(), problem), []).append(path)
    lines = []
    for (shape, problem), paths in places.items():
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        more = f" and {len(paths) - 1} more ({names})" if paths[1:] else ""
        lines.append(f"{paths[0]}{shape}{more}: {problem}")
    return lines


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None where nothing is close."""
    known = list(known)
    matches = get_close_matches(word, known, n=1, cutoff=0.6)
    if not matches:
        lowered = {name.lower(): name for name in known}
        matches = [lowered[w] for w in get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)]
    return matches[0] if matches else None

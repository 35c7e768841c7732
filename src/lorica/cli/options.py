"""Reading the flags of commands that take settings, which are made from the settings."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorica.config.names import ALIASES
from lorica.config.settings import Setting
from lorica.errors import ConfigError, nearest

_TRUTHS = ("true", "false", "yes", "no", "on", "off", "null", "1", "0")
_SETTINGS_FILES = (".yaml", ".yml")


@dataclass
class CommandLine:
    """What stood behind `lorica train`, but for the options of the command itself.

    Attributes:
        flags: name of the setting (or an alias) -> its text.
        files: words that are settings files.
        words: further words, where the command takes some.
    """

    flags: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


def read_flags(
    given: Sequence[str], known: Mapping[str, Setting], own: Sequence[str] = (), *, words: int = 0
) -> CommandLine:
    """`--key value`, `--key=value`, `key=value`, for truths also `--key` and `--no-key`; files.

    Args:
        own: options of the command itself, for the nearest name.
        words: how many words are taken that are neither flags nor settings files.

    Raises:
        ConfigError: something that is none of these, a flag without its value or given twice; all
            at once.
    """
    found = CommandLine()
    problems: list[str] = []
    rest, before = list(given), ""
    while rest:
        word, flag = rest.pop(0), before
        before = word
        if not word.startswith("-") and "=" not in word:
            if not word.endswith(_SETTINGS_FILES) and len(found.words) < words:
                found.words.append(word)
            elif word.endswith(_SETTINGS_FILES) or Path(word).is_file():
                found.files.append(Path(word))
            else:
                problems.append(_stray(word, flag, known))
            continue
        problem = _read_one(word, rest, known, own, found.flags)
        problems += [problem] if problem else []
    if len(found.files) > 1:
        problems.append(f"there are several settings files: {', '.join(map(str, found.files))}")
    if problems:
        raise ConfigError(
            "the command line cannot be read",
            problems=problems,
            mend="lorica train --help lists what there is",
        )
    return found


def _read_one(
    word: str,
    rest: list[str],
    known: Mapping[str, Setting],
    own: Sequence[str],
    flags: dict[str, str],
) -> str | None:
    """Put one flag into `flags`, with its value taken off `rest`; returns what is wrong with it."""
    name, equals, value = word.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    setting = known.get(ALIASES.get(plain, plain))
    follows = bool(rest) and not (rest[0].startswith("--") and len(rest[0]) > 2)
    if name.startswith("-") and not name.startswith("--"):
        if follows and not equals:
            rest.pop(0)
        return _unknown(name, known, own)
    if not equals:
        positive = known.get(ALIASES.get(plain[3:], plain[3:]))
        if setting is None and plain.startswith("no_") and _is_truth(positive):
            plain, value = plain[3:], "false"
        elif _is_truth(setting) and not (follows and _fits(rest[0], setting)):
            value = "true"
        elif follows:
            value = rest.pop(0)
        elif setting is None:
            return _unknown(name, known, own)
        else:
            return f"{name} needs a value; one that begins with -- is written {name}=VALUE"
    if setting is None and not equals:
        near = nearest(name, [*own, *(one.flag for one in known.values())])
        if near in own:
            return f"{name} is no flag; did you mean {near}?"
    if plain in flags:
        return f"{name} is given twice"
    flags[plain] = value
    return None


def _stray(word: str, before: str, known: Mapping[str, Setting]) -> str:
    """What is wrong with a word that nothing takes; it may be meant for the flag before it, which
    can stand alone.
    """
    plain = before.lstrip("-").replace("-", "_")
    setting = known.get(ALIASES.get(plain, plain)) if before.startswith("--") else None
    if setting is not None and (words := choices(setting.kinds)):
        near = nearest(word, words)
        meant = f"; did you mean {near}?" if near else ""
        return f"{word!r} is no value of {before}; expected one of {', '.join(words)}{meant}"
    return f"{word!r} is neither a flag nor a settings file"


def _unknown(name: str, known: Mapping[str, Setting], own: Sequence[str]) -> str:
    near = nearest(name, [*own, *(setting.flag for setting in known.values())])
    return f"{name} is no flag" + (f"; did you mean {near}?" if near else "")


def _is_truth(setting: Setting | None) -> bool:
    return setting is not None and bool in setting.kinds


def _fits(word: str, setting: Setting | None) -> bool:
    """Whether a word behind a flag that can stand alone is its value."""
    kinds = setting.kinds if setting else ()
    return word.lower() in (*_TRUTHS, *choices(kinds))


def choices(kinds: Sequence[object]) -> list[str]:
    """The words that the alternatives of a type name one by one."""
    return [
        str(choice)
        for kind in kinds
        if typing.get_origin(kind) is typing.Literal
        for choice in typing.get_args(kind)
    ]

"""Pieces of text -> token ids, where some pieces may hold control tokens and some are text only.

Pieces are tokenized apart from each other (see `lorica.data.encode` for the reason). A piece inside
a record must not be taken for the start of a text: tokenizers such as SentencePiece put a space in
front of every start, and the record would read differently from what its pieces say.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from typing import Any, Protocol

from lorica.data.template import Span, control_tokens
from lorica.errors import DataError

_BATCH = 2_000  # texts
_STRETCH = 4 * _BATCH
_ANCHORS = ("\n", ".", "a")  # what stands before a piece that is not the start of its text


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def all_special_tokens(self) -> Any: ...
    def __call__(self, text: Any, /, **kwargs: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: Any, /) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """Text to tokenize. `first`: at the start of the record's text; `literal`: see `Span`."""

    text: str
    trained: bool
    literal: bool
    first: bool

    @property
    def key(self) -> tuple[str, bool, bool]:
        return self.text, self.literal, self.first


def tokenizer_digest(tokenizer: Any) -> str | None:
    """SHA-256 of all that decides how a tokenizer of the tokenizers library spells; None for one of
    another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    own = [type(tokenizer).__qualname__, version("tokenizers"), version("transformers")]
    own += [json.dumps(tokenizer.init_kwargs, sort_keys=True, default=str)]
    own += [json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
    own += [backend.to_str()]
    return hashlib.sha256("\n".join(own).encode()).hexdigest()


def pieces_of(spans: Sequence[Span]) -> list[Piece]:
    """The spans that have text; the first is the start of the record's text."""
    texts = [span for span in spans if span.text]
    return [Piece(s.text, s.trained, s.literal, index == 0) for index, s in enumerate(texts)]


Key = tuple[str, bool, bool]


@dataclass(frozen=True)
class PieceTokenizer:
    """Tokenizes pieces in batches, each different one once."""

    tokenizer: Tokenizer

    def ids(
        self, pieces: Iterable[Piece], *, progress: Callable[[float], None] | None = None
    ) -> dict[Key, list[int]]:
        """Token ids by `Piece.key`. `progress` is told the share that is done.

        Raises:
            DataError: plain text that this tokenizer cannot keep from being a special token.
        """
        keys = [*dict.fromkeys(piece.key for piece in pieces)]
        found: dict[Key, list[int]] = {}
        for start in range(0, len(keys), _STRETCH):
            self._add(keys[start : start + _STRETCH], found)
            if progress is not None:
                progress(len(found) / len(keys))
        if self.spelled(key[0] for key in found if key[1]):
            for key, row in found.items():
                if key[1] and self.control_text.search(key[0]):
                    self._check_plain(key[0], row)
        return found

    def spelled(self, texts: Iterable[str]) -> bool:
        """Whether any of the texts may spell a special token: one search for many of them, which
        may also find what only two of them together spell.
        """
        search, rest = self.control_text.search, iter(texts)
        while stretch := [*islice(rest, _STRETCH)]:
            if search("\n".join(stretch)):
                return True
        return False

    def _add(self, keys: Sequence[Key], found: dict[Key, list[int]]) -> None:
        for literal in (False, True):
            same = [key for key in keys if key[1] == literal]
            plain = [key for key in same if key[2] or not self._start_is_special]
            inner = [key for key in same if not (key[2] or not self._start_is_special)]
            rows = self._raw([key[0] for key in plain], literal=literal)
            found.update(zip(plain, rows, strict=True))
            found.update(zip(inner, self._continued(inner, literal), strict=True))

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the special tokens, except the unknown token, which stands for text."""
        names = control_tokens(self.tokenizer)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        eos = self.tokenizer.eos_token_id  # GPT-2 has one token for everything
        ids = frozenset(self.tokenizer.convert_tokens_to_ids(list(names))) - {unknown}
        return ids if eos is None else ids | {eos}

    @cached_property
    def control_text(self) -> re.Pattern:
        """Finds spellings of special tokens."""
        return re.compile("|".join(map(re.escape, control_tokens(self.tokenizer))) or "(?!)")

    @cached_property
    def _start_is_special(self) -> bool:
        """Whether the tokenizer adds something, such as a space, at the start of a text."""
        line, word, both = self._raw(["\n", "x", "\nx"], literal=True)
        return both[: len(line)] != line or both[len(line) :] != word

    def _raw(self, texts: list[str], *, literal: bool) -> list[list[int]]:
        rows: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):  # a batch at once, for the memory of its offsets
            try:
                encoded = self.tokenizer(
                    texts[start : start + _BATCH],
                    add_special_tokens=False,
                    split_special_tokens=literal,
                    return_attention_mask=False,
                    verbose=False,  # the length of a text is not the model's concern here
                )
            except BaseException as error:  # its patterns may fail in Rust, which is no Exception
                if type(error).__name__ != "PanicException":
                    raise
                raise DataError(
                    f"the tokenizer failed on a text: {str(error)[:200]}",
                    mend="look for a pattern in its tokenizer.json that takes too long",
                ) from error
            rows += encoded["input_ids"]
        return rows

    def _continued(self, keys: list[Key], literal: bool) -> list[list[int]]:
        """Ids of texts that follow other text: behind an anchor, whose own ids are taken off."""
        found: list[list[int] | None] = [None] * len(keys)
        for anchor in _ANCHORS:
            head = self._raw([anchor], literal=True)[0]
            left = [index for index, ids in enumerate(found) if ids is None]
            rows = self._raw([anchor + keys[index][0] for index in left], literal=literal)
            for index, row in zip(left, rows, strict=True):
                if row[: len(head)] == head:  # else the anchor melted into the text
                    found[index] = row[len(head) :]
        return [
            self._raw([key[0]], literal=literal)[0] if ids is None else ids
            for key, ids in zip(keys, found, strict=True)
        ]

    def _check_plain(self, text: str, ids: list[int]) -> None:
        if not self.control_ids.isdisjoint(ids):
            raise DataError(
                "the tokenizer makes a special token of plain text: "
                f"{', '.join(self.control_text.findall(text)[:3])}",
                mend="remove it from the data, or set parse_special_tokens",
            )

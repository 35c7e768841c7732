"""Records -> token ids and labels for causal language models.

The one encoding for training, evaluation, chat and serving: what is asked later is spelled as it
was trained.

Boundaries. A record is a row of pieces: prompt and completion, or the spans of a chat template.
Where the trained part begins or ends the text is tokenized in two, because at inference the model
is handed the tokens of the prompt alone: tokenizing both together would train on merges across the
boundary that generation never meets.

Special tokens. BOS and EOS are placed by id, here and once. Special tokens that the data spells
stay text (a message cannot forge a turn); only a chat template writes control tokens.

Labels are not shifted. The first is always -100, since nothing predicts the first token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from lorica.data.examples import IGNORED, Encoded, Example
from lorica.data.problems import counted
from lorica.data.template import FALLBACK_STATEMENT, ChatTemplate, Span, control_tokens
from lorica.data.tokens import Key, Piece, PieceTokenizer, Tokenizer, pieces_of
from lorica.errors import ConfigError, DataError

MIN_LENGTH = 8
TrainOn = Literal["completion", "last", "all"]
_PARTS = ("tokenizer", "template")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Fault:
    """A record that cannot be encoded: its index, the kind of fault, and the message for it."""

    row: int
    kind: Literal["cannot be rendered", "have nothing to learn"]
    text: str


@dataclass(frozen=True)
class CausalEncoder:
    """How records become token ids and labels.

    Attributes:
        tokenizer: a transformers tokenizer.
        template: renders chat records, and prompt records where `prompt_as_chat`; None: the
            tokenizer's own, or the plain fallback.
        max_length: tokens per example; None: no limit. Prompt and chat records are cut to it: first
            the prompt, from its left, down to a quarter of max_length, then the end. What is cut
            at its end gets no EOS, so that the model does not learn to stop in the middle. Texts
            are not cut but divided into windows.
        train_on: "completion": completions, and all turns of the assistant; "last": the last turn
            only; "all": every token.
        add_bos: whether to begin with BOS. None: as the tokenizer does by itself; a chat template
            decides for itself. There is never more than one.
        add_eos: whether to end with EOS, trained, where a chat template does not end the turn with
            a control token of its own.
        separator: between prompt and completion; see `separator_of`.
        parse_special_tokens: let text and prompt records spell control tokens. For texts that
            another program rendered with a template.
        prompt_as_chat: render prompt records as a conversation of two turns.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    max_length: int | None = None
    train_on: TrainOn = "completion"
    add_bos: bool | None = None
    add_eos: bool = True
    separator: str = ""
    parse_special_tokens: bool = False
    prompt_as_chat: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < MIN_LENGTH:
            raise ConfigError(f"max_length is {self.max_length}", expected=f"at least {MIN_LENGTH}")
        if self.train_on not in ("completion", "last", "all"):
            raise ConfigError(
                f"train_on is {self.train_on!r}", expected='"completion", "last" or "all"'
            )
        if self.add_eos and self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no EOS token, so that the model would never learn to stop",
                mend="set tokenizer.eos_token, or add_eos=False",
            )
        if self.add_bos and self.tokenizer.bos_token_id is None:
            raise DataError("add_bos is set, but the tokenizer has no BOS token")

    def encode(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        origins: Any = None,
        progress: Progress | None = None,
    ) -> Encoded:
        """Encode records of the formats chat, prompt and text.

        Args:
            records: canonical rows, such as a `Dataset`.
            origins: (file, line) per record for messages; None: those of the dataset, or indices.
            progress: is told about how many records are done.

        Raises:
            DataError: records without a trained token, all of them named; a template that fails.
        """
        encoded, faults = self.attempt(records, origins=origins, progress=progress)
        for kind in ("cannot be rendered", "have nothing to learn"):
            if texts := [fault.text for fault in faults if fault.kind == kind]:
                raise _refused(texts, len(records), kind)
        return encoded

    def attempt(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        origins: Any = None,
        progress: Progress | None = None,
    ) -> tuple[Encoded, list[Fault]]:
        """What `encode` does, but records that it would refuse are left out and come back."""
        origins = origins if origins is not None else getattr(records, "origins", None)
        rendered, dropped, faults = self._rendered(records, origins)
        rows = {index: pieces_of(spans) for index, spans in rendered.items()}
        told = None if progress is None else lambda share: progress(int(share * len(records)))
        ids = self._pieces.ids((piece for row in rows.values() for piece in row), progress=told)
        examples: list[Example] = []
        for index, row in rows.items():
            made = self._examples(records[index], row, ids, index)
            if any(example.num_trained for example in made):
                examples += made
            else:
                text = f"{_place(origins, index)}: no trained token"
                faults.append(Fault(index, "have nothing to learn", text))
        notes = [*self._notes(records, examples), *_dropped_note(dropped)]
        return Encoded(examples, notes), faults

    def _rendered(
        self, records: Sequence[Mapping[str, Any]], origins: Any
    ) -> tuple[dict[int, list[Span]], list[str], list[Fault]]:
        """The spans of every record that has some, what templates dropped, what failed."""
        rendered: dict[int, list[Span]] = {}
        dropped: list[str] = []
        faults: list[Fault] = []
        for index, record in enumerate(records):
            try:
                rendered[index], lost = self._spans(record)
            except DataError as error:
                text = f"{_place(origins, index)}: {error}"
                faults.append(Fault(index, "cannot be rendered", text))
                continue
            if lost:
                dropped.append(f"{_place(origins, index)}: {lost[0]}")
        return rendered, dropped, faults

    def prompt_ids(self, record: Mapping[str, Any], *, most: int | None = None) -> list[int]:
        """The ids after which the model answers: exactly how `encode` begins the same record.

        Args:
            record: a chat record: everything before its last message where that is the assistant's;
                a prompt record: its prompt; a text record: its text.
            most: keep BOS and the last ids only, so many in all.
        """
        chat = self._is_chat(record)
        if chat:
            messages = _messages(record)
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            tools = record.get("tools")
            spans = self._chat_template.render(messages, add_generation_prompt=True, tools=tools)
        elif "prompt" in record:
            spans = [Span(record["prompt"] + self.separator, False, self._literal)]
        else:
            spans = [Span(record["text"], False, self._literal)]
        pieces = pieces_of(spans)
        found = self._pieces.ids(pieces)
        ids = self._with_bos([token for piece in pieces for token in found[piece.key]], chat=chat)
        if most is None or len(ids) <= most:
            return ids
        num_bos = int(ids[:1] == [self.tokenizer.bos_token_id])
        return ids[:num_bos] + ids[num_bos + len(ids) - most :]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Where generation stops: EOS and the control token that ends a turn of the template."""
        stops = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        if not self._chat_template.is_fallback:
            trained = "".join(s.text for s in self._chat_template.render(probe) if s.trained)
            for token in control_tokens(self.tokenizer):
                if trained.endswith(token):
                    stops.append(self.tokenizer.convert_tokens_to_ids(token))
        return tuple(dict.fromkeys(stops))

    @cached_property
    def _pieces(self) -> PieceTokenizer:
        return PieceTokenizer(self.tokenizer)

    @cached_property
    def _bos(self) -> Any:
        return self.tokenizer.bos_token_id  # looked up by name: 20 microseconds, for every record

    @cached_property
    def _eos(self) -> Any:
        return self.tokenizer.eos_token_id

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return self.template if self.template is not None else ChatTemplate.of(self.tokenizer)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides about token ids beside records and tokenizer, as plain values."""
        template = self._chat_template
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PARTS}
        return plain | {
            "template": [template.source, dict(template.variables), template.is_fallback],
            "control_tokens": list(template.control_tokens),
        }

    @property
    def _literal(self) -> bool:
        return not self.parse_special_tokens

    def _is_chat(self, record: Mapping[str, Any]) -> bool:
        return "messages" in record or (self.prompt_as_chat and "prompt" in record)

    def _spans(self, record: Mapping[str, Any]) -> tuple[list[Span], list[str]]:
        """What a record says, and what its template dropped."""
        everything = self.train_on == "all"
        if self._is_chat(record):
            messages = _messages(record)
            if self.train_on == "last":
                messages = [*({**m, "train": False} for m in messages[:-1]), messages[-1]]
            spans = self._chat_template.render(messages, tools=record.get("tools"))
            lost = self._chat_template.dropped(messages, spans)
            return [span._replace(trained=span.trained or everything) for span in spans], lost
        if "prompt" in record and "completion" in record:
            prompt = Span(record["prompt"] + self.separator, everything, self._literal)
            return [prompt, Span(record["completion"], True, self._literal)], []
        if "text" in record and "label" not in record:
            return [Span(record["text"], True, self._literal)], []
        raise DataError(
            f"a record with the columns {', '.join(record)} is nothing to continue",
            expected="messages, or prompt and completion, or text",
        )

    @cached_property
    def _tokenizer_adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]

    def _with_bos(self, ids: list[int], *, chat: bool) -> list[int]:
        bos = self._bos
        wanted = self.add_bos
        if wanted is None:
            decided = chat and not self._chat_template.is_fallback
            wanted = False if decided else self._tokenizer_adds_bos
        return [bos, *ids] if wanted and ids[:1] != [bos] else ids

    def _examples(
        self, record: Mapping[str, Any], pieces: list[Piece], found: dict[Key, list[int]], row: int
    ) -> list[Example]:
        ids: list[int] = []
        labels: list[int] = []
        for piece in pieces:
            tokens = found[piece.key]
            ids += tokens
            labels += tokens if piece.trained else [IGNORED] * len(tokens)
        chat = self._is_chat(record)
        if not chat and "prompt" not in record:
            return self._windows(ids, row)
        begun = self._with_bos(ids, chat=chat)
        num_bos = int(bool(begun) and begun[0] == self._bos)
        labels = [IGNORED] * (len(begun) - len(ids)) + labels
        ids, labels = self._ended(begun, labels, pieces)
        labels[:1] = [IGNORED] * len(labels[:1])
        return [_fitted(ids, labels, self.max_length, num_bos, row)]

    def _ended(
        self, ids: list[int], labels: list[int], pieces: list[Piece]
    ) -> tuple[list[int], list[int]]:
        """End with the control token of the last trained turn, or with EOS; nothing behind it."""
        if self.train_on == "all":
            written = [piece for piece in pieces if piece.text.strip()]  # the last may be a newline
            tail = written[-1].text.rstrip() if written and not written[-1].literal else ""
            closed = tail.endswith(control_tokens(self.tokenizer))
        else:
            last = len(labels)
            while last and labels[last - 1] == IGNORED:
                last -= 1
            if not last:
                return ids, labels  # nothing is trained: reported by the caller
            ids, labels = ids[:last], labels[:last]
            closed = ids[-1] in self._pieces.control_ids
        if self.add_eos and not closed:
            ids, labels = [*ids, self._eos], [*labels, self._eos]
        return ids, labels

    def _windows(self, ids: list[int], row: int) -> list[Example]:
        """A text in consecutive windows; every token but the first is learned exactly once.

        Each window begins with BOS, or, where there is none, with the last token of the one before.
        """
        if self.add_eos and ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
        head = self._with_bos([], chat=False)
        if head and ids[:1] == head:
            ids = ids[1:]
        most = self.max_length or len(ids) + len(head)
        stride = most - 1
        starts = range(0, len(ids) if head else max(1, len(ids) - 1), max(1, stride))
        size = stride if head else most
        parts = [[*head, *ids[start : start + size]] for start in starts]
        return [Example(part, [IGNORED, *part[1:]], row) for part in parts]

    def _notes(self, records: Sequence[Any], examples: list[Example]) -> list[str]:
        notes = []
        cut = [example for example in examples if example.num_cut]
        if cut:
            lost = sum(example.num_trained_cut for example in cut)
            notes.append(
                f"{counted(len(cut), 'record')} ({len(cut) / len(records):.1%}) cut to "
                f"{self.max_length} tokens, {counted(lost, 'trained token')} lost"
            )
        if len(examples) > len(records):
            texts = counted(len(records), "text")
            notes.append(f"{texts} in windows of up to {self.max_length} tokens")
        if self._literal and self._pieces.spelled(t for r in records for t in _texts(r)):
            spelled = sum(map(self._spells_control, records))
            if spelled:
                notes.append(
                    f"special tokens spelled in {counted(spelled, 'record')} stay text "
                    "(parse_special_tokens reads them as tokens)"
                )
        if any(self._is_chat(record) for record in records) and self._chat_template.is_fallback:
            notes.append(FALLBACK_STATEMENT)
        return notes

    def _spells_control(self, record: Mapping[str, Any]) -> bool:
        return any(self._pieces.control_text.search(text) for text in _texts(record))


def separator_of(records: Iterable[Mapping[str, Any]]) -> str:
    """What to put between prompts and completions, for all records of a set alike.

    Nothing where the data parts them itself (all prompts end, or all completions begin, with white
    space), else a line break: without either the model could not tell where the prompt ends.
    """
    ends = begins = True
    for record in records:
        prompt, completion = record["prompt"], record["completion"]
        ends = ends and (not prompt or prompt[-1].isspace())
        begins = begins and completion[:1].isspace()
        if not (ends or begins):
            return "\n"
    return ""


def _texts(record: Mapping[str, Any]) -> list[str]:
    found = [record.get(key) for key in ("text", "prompt", "completion")]
    return [text for text in found if isinstance(text, str)]


def _messages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "messages" in record:
        return list(record["messages"])
    turns: list[Mapping[str, Any]] = [{"role": "user", "content": record["prompt"]}]
    if "completion" in record:
        turns.append({"role": "assistant", "content": record["completion"]})
    return turns


def _fitted(
    ids: list[int], labels: list[int], max_length: int | None, num_bos: int, row: int
) -> Example:
    """Cut to max_length so that a trained token is always left (see `CausalEncoder.max_length`)."""
    excess = 0 if max_length is None else len(ids) - max_length
    if max_length is None or excess <= 0:
        return Example(ids, labels, row)
    trained = [label != IGNORED for label in labels]
    first = trained.index(True) if True in trained else len(ids)
    cut = min(excess, max(0, first - num_bos - max_length // 4))
    kept_ids = (ids[:num_bos] + ids[num_bos + cut :])[:max_length]
    kept_labels = (labels[:num_bos] + labels[num_bos + cut :])[:max_length]
    lost = sum(trained) - (len(kept_labels) - kept_labels.count(IGNORED))
    return Example(kept_ids, kept_labels, row, len(ids) - len(kept_ids), lost)


def _place(origins: Any, index: int) -> str:
    if origins is None:
        return f"record {index + 1}"
    file, line = origins[index]
    return f"{file}:{line}"


def _refused(problems: list[str], total: int, why: str) -> DataError:
    shown = problems[:3] + ([f"and {len(problems) - 3:,} more"] if len(problems) > 3 else [])
    return DataError(f"{len(problems):,} of {total:,} records {why}", problems=shown)


def _dropped_note(dropped: list[str]) -> Iterator[str]:
    if dropped:
        count = counted(len(dropped), "record")
        yield f"the template left out text of {count}, first {dropped[0]}"

"""Chat templates: messages -> spans of text, each known to be trained or not, literal or not.

The one rendering for training, evaluation, chat and serving. What is trained is the assistant's
part with its turn end: what stands in `{% generation %}` where the template has it; otherwise what
the rendering gains by the assistant's message, found by rendering the conversation in prefixes.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from lorica.data.budget import TooMuchWork
from lorica.data.problems import show
from lorica.data.sandbox import (
    LITERAL,
    LITERAL_END,
    MARKS,
    MAX_TEMPLATE_BYTES,
    TRAINED,
    TRAINED_END,
    Sandbox,
)
from lorica.errors import DataError

# For tokenizers without a template. Plain words, since a base model has no tokens for turns; the
# space belongs to the answer, as byte-level tokenizers put it at the front of a word.
FALLBACK = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
Assistant:{% generation %}{{ " " + message.content + eos_token }}{% endgeneration %}
{%- else -%}
{{ message.role.capitalize() + ": " + message.content }}
{%- endif -%}
{{ "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""
FALLBACK_STATEMENT = (
    'the tokenizer has no chat template; plain turns are used: "User: ...", "Assistant: ...", '
    "each answer ended by the EOS token"
)
_MAX_MESSAGES = 1_000
_MAX_OUTPUT = 64 * 2**20  # characters

Message = Mapping[str, Any]


class Span(NamedTuple):
    """A piece of a rendering.

    Attributes:
        text: the piece.
        trained: whether the loss falls on it.
        literal: special tokens spelled in it come from the data and are text, never control.
    """

    text: str
    trained: bool
    literal: bool = False


class _Interval(NamedTuple):
    start: int
    end: int


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the tokens of its tokenizer.

    Attributes:
        source: the jinja2 text.
        variables: further names the template may use, such as bos_token and eos_token.
        control_tokens: special tokens. Where a message spells one, it stays text.
        is_fallback: whether it is ours because the tokenizer has none.
    """

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    control_tokens: tuple[str, ...] = ()
    is_fallback: bool = False

    def __post_init__(self) -> None:
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise DataError(
                f"the chat template has {size:,} bytes", expected=f"at most {MAX_TEMPLATE_BYTES:,}"
            )
        try:
            _ = self._compiled
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is no valid jinja2, line {error.lineno}: "
                f"{str(error.message)[:300]}"
            ) from error
        except RecursionError:
            raise DataError("the chat template is nested too deeply") from None
        except Exception as error:  # Python's own compiler, on what became of the template
            raise DataError(
                f"the chat template cannot be compiled: {type(error).__name__}: {str(error)[:200]}"
            ) from error

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatTemplate":
        """The template of a transformers tokenizer, or the plain fallback where it has none."""
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, Mapping):
            if "default" not in source:
                raise DataError(
                    f"the tokenizer has the chat templates {', '.join(source)}",
                    expected="one of them named default",
                    mend="set tokenizer.chat_template to one of them",
                )
            source = source["default"]
        if source is not None and not isinstance(source, str):
            raise DataError(f"the chat template is a {type(source).__name__}", expected="text")
        names = {
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str) or hasattr(token, "content")
        }
        control = control_tokens(tokenizer)
        if source is None:
            return cls(FALLBACK, {"eos_token": "", **names}, control, is_fallback=True)
        return cls(source, names, control)

    @cached_property
    def digest(self) -> str:
        """sha256 of the template's text, for caches and manifests."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def _environment(self) -> Sandbox:
        return Sandbox()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._environment.compiled(self.source)

    @cached_property
    def _control(self) -> re.Pattern:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _marks_generation(self) -> bool:
        return re.search(r"\{%-?\+?\s*generation\s*[-+]?%\}", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> list[Span]:
        """Render a conversation.

        Args:
            messages: {"role", "content", ["train"], ...}; `train` False takes a message of the
                assistant out of the loss.
            add_generation_prompt: end with what asks the model for its turn; nothing is trained.
            tools: handed to the template.

        Returns:
            Spans whose texts together are the rendering.

        Raises:
            DataError: the template refuses the messages, fails, works too long, or does not show
                where the assistant's part begins and ends.
        """
        marked = self._marked(messages)
        if add_generation_prompt:
            text = self._text(marked, prompt=True, tools=tools)
            return self._spans(_without(text, TRAINED + TRAINED_END), [])
        text = self._text(marked, prompt=False, tools=tools)
        if self._marks_generation:
            text, intervals = self._generated(text, messages)
        else:
            intervals = self._gained(text, messages, marked, tools)
        return self._spans(text, [self._with_turn_end(text, interval) for interval in intervals])

    def dropped(self, messages: Sequence[Message], spans: Sequence[Span]) -> list[str]:
        """What of the messages' texts does not occur in their rendering, in words for the user.

        Templates of reasoning models drop the thinking of earlier turns, some drop system messages.
        """
        text = "".join(span.text for span in spans)
        lost, position = [], 0
        for number, message in enumerate(messages, start=1):
            for key in ("content", "reasoning_content", "thinking"):
                value = message.get(key)
                if not isinstance(value, str):
                    continue
                found = text.find(value.strip(), position)  # mostly in order, so that this is fast
                if found >= 0:
                    position = found
                elif value.strip() not in text:
                    lost.append(f"message {number} ({message['role']}, {key}): {show(value)}")
        return lost

    # texts with marks

    def _marked(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages whose control tokens are wrapped in marks, without our key `train`."""
        return [
            {
                key: value if key == "role" else self._mark(value)
                for key, value in message.items()
                if key != "train" and value is not None
            }
            for message in messages
        ]

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            if any(mark in value for mark in MARKS):
                raise DataError(
                    f"a message holds a Unicode noncharacter (U+FDD0 to U+FDD3): {show(value)}",
                    mend="remove it; these signs are reserved for use inside programs",
                )
            return self._control.sub(rf"{LITERAL}\g<0>{LITERAL_END}", value)
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item) for item in value]
        return value

    def _text(self, messages: list[dict[str, Any]], *, prompt: bool, tools: Any) -> str:
        """The rendering, marks included, within the bounds of time and size."""
        parts, length = [], 0
        try:
            with self._environment.budget():
                for part in self._compiled.generate(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    **self.variables,
                ):
                    self._environment.charge(1)
                    parts.append(part)
                    length += len(part)
                    if length > _MAX_OUTPUT:
                        raise TooMuchWork(f"an output of more than {_MAX_OUTPUT:,} characters")
        except TooMuchWork as error:
            raise DataError(f"the chat template was stopped: {error}") from None
        except RecursionError:
            raise DataError("the chat template calls itself without end") from None
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:8])
            raise DataError(
                f"the chat template refuses the messages: {str(error)[:500]}",
                expected=f"roles seen: {roles}",
            ) from error
        except Exception as error:  # a stranger's program can raise anything
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise DataError(f"the chat template failed: {what}") from error
        return "".join(parts)

    # where the assistant's parts are

    def _generated(self, text: str, messages: Sequence[Message]) -> tuple[str, list[_Interval]]:
        """The text without generation marks, and the marked intervals that are to be trained."""
        clean, intervals, start, length = [], [], 0, 0
        for part in re.split(f"([{TRAINED}{TRAINED_END}])", text):
            if part == TRAINED:
                start = length
            elif part == TRAINED_END:
                intervals.append(_Interval(start, length))
            else:
                clean.append(part)
                length += len(part)
        answers = [message for message in messages if message["role"] == "assistant"]
        wanted = [message.get("train", True) for message in answers]
        if all(wanted):
            return "".join(clean), intervals
        if len(intervals) != len(wanted):
            raise DataError(
                f"the chat template marks {len(intervals)} generated parts for {len(wanted)} "
                'messages of the assistant, so that "train": false cannot be honoured'
            )
        kept = [interval for interval, train in zip(intervals, wanted, strict=True) if train]
        return "".join(clean), kept

    def _gained(
        self, full: str, messages: Sequence[Message], marked: list[dict[str, Any]], tools: Any
    ) -> list[_Interval]:
        """What each assistant's message adds to the rendering of the conversation before it."""
        if len(messages) > _MAX_MESSAGES:
            raise DataError(
                f"a conversation of {len(messages):,} messages",
                expected=f"at most {_MAX_MESSAGES:,}, since the template does not mark what the "
                "assistant says and has to be rendered for each of its messages",
                mend="divide the conversation, or put {% generation %} into the template",
            )
        intervals = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not message.get("train", True):
                continue
            before = self._text(marked[:index], prompt=True, tools=tools)
            after = full
            if index + 1 < len(messages):
                after = self._text(marked[: index + 1], prompt=False, tools=tools)
            if not (after.startswith(before) and full.startswith(after)):
                return self._located(full, messages, marked, tools)
            intervals.append(_Interval(len(before), len(after)))
        return intervals

    def _located(
        self, full: str, messages: Sequence[Message], marked: list[dict[str, Any]], tools: Any
    ) -> list[_Interval]:
        """The assistant's parts where the template renders earlier turns differently from the last.

        Templates of reasoning models do so. Each part begins after its generation prompt, which
        must stand in the rendering once per message of the assistant, and ends with the message's
        content and what the template puts behind it.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        head = marked[: turns[0]]
        asked = self._text(head, prompt=True, tools=tools)
        plain = self._text(head, prompt=False, tools=tools)
        opening = asked[len(plain) :] if asked.startswith(plain) else ""
        starts = [m.end() for m in re.finditer(re.escape(opening), full)] if opening else []
        if len(starts) != len(turns):
            raise _unclear(turns[0])
        intervals = []
        for start, stop, index in zip(starts, [*starts[1:], len(full)], turns, strict=True):
            if messages[index].get("train", True):
                rendered = self._text(marked[: index + 1], prompt=False, tools=tools)
                end = _content_end(full[start:stop], rendered, marked[index]["content"])
                if end is None:
                    raise _unclear(index)
                intervals.append(_Interval(start, start + end))
        return intervals

    def _with_turn_end(self, text: str, interval: _Interval) -> _Interval:
        """Let the interval end with the control token that ends the turn, as generation does."""
        start, end = interval
        last = None
        for found in self._control.finditer(text, start, end):
            if text[found.start() - 1 : found.start()] != LITERAL:
                last = found
        if last is not None and not text[last.end() : end].strip():
            return _Interval(start, last.end())  # white space behind it is never generated
        following = self._control.match(text, end)
        return _Interval(start, following.end() if following else end)

    def _spans(self, text: str, intervals: list[_Interval]) -> list[Span]:
        spans, position, literal = [], 0, False
        for start, end in [*intervals, _Interval(len(text), len(text))]:
            start = max(start, position)
            for begin, stop, trained in ((position, start, False), (start, end, True)):
                for part in re.split(f"([{LITERAL}{LITERAL_END}])", text[begin:stop]):
                    if part in (LITERAL, LITERAL_END):
                        literal = part == LITERAL
                    elif part:
                        spans.append(Span(part, trained, literal))
            position = end
        return spans


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts that a tokenizer turns into special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token.content) for token in added.values() if token.special}
    return tuple(sorted({*special, *map(str, tokenizer.all_special_tokens)} - {""}))


def _without(text: str, marks: str) -> str:
    return text.translate(dict.fromkeys(map(ord, marks)))


def _content_end(part: str, rendered: str, content: str) -> int | None:
    """Where `content`, and what follows it in the shorter rendering, ends in `part`."""
    answer = content.rpartition("</think>")[2]  # templates drop the thinking of earlier turns
    for core in (content.strip(), answer.strip()):
        at = rendered.rfind(core)
        closing = rendered[at + len(core) :]
        if at >= 0 and core and closing:
            found = part.find(core + closing)
            if found >= 0:
                return found + len(core) + len(closing)
    return None


def _unclear(index: int) -> DataError:
    return DataError(
        "the chat template does not show where the assistant's part begins and ends "
        f"(message {index + 1}): it renders earlier turns differently from the last",
        expected="a rendering that begins with the rendering of the messages before",
        mend="put {% generation %} ... {% endgeneration %} around that part, or train on "
        'the last answer only ("train": false in the earlier ones)',
    )

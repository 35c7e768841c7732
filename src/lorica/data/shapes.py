"""The shapes of rows that are seen in the field, and what each becomes.

    chat            {"messages": [{"role", "content", ["train"]}, ...]}
    prompt          {"prompt": str, "completion": str}
    classification  {"text": str, ["text_pair": str], "label": str | int}
    seq2seq         {"source": str, "target": str}
    text            {"text": str}

A new shape is one line in `SHAPES`. Further columns of a row are kept.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorica.data.chat import to_messages, turns
from lorica.data.problems import RowProblem, show

Row = dict[str, Any]

CANONICAL = {  # format -> the columns it needs and those it may have
    "chat": (("messages",), ("tools",)),
    "prompt": (("prompt", "completion"), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "seq2seq": (("source", "target"), ()),
    "text": (("text",), ()),
}
ANSWERS = ("references", "slots")  # optional in every format: lists of text
_MAY_BE_EMPTY = ("prompt",)  # unconditional generation is trained on empty prompts
CHECKED = (*ANSWERS, "label")  # canonical columns that are more than any text


@dataclass(frozen=True)
class Shape:
    """A form of rows that is seen in the field.

    Attributes:
        name: as the statement to the user calls it.
        format: the canonical format it becomes.
        columns: source column -> canonical column ("" where `convert` reads it).
        optional: the same for columns that may be missing.
        target: the source column that holds what is to be learned.
        convert: for shapes that are more than a renaming: (row, source names) -> canonical row.
    """

    name: str
    format: str
    columns: Mapping[str, str]
    target: str
    optional: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Row, Mapping[str, str]], Row] | None = None

    def every(self) -> dict[str, str]:
        return {**self.columns, **self.optional}


def value_of(row: Row, source: str, canonical: str) -> Any:
    if canonical == "label":
        return _label(row, source)
    if canonical in ANSWERS:
        return answers_of(row[source], source)
    return text_of(row, source, empty=canonical in _MAY_BE_EMPTY)


def text_of(row: Row, name: str, *, empty: bool = False) -> str:
    value = row[name]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        mend = (
            "write it in quotes" if isinstance(value, int | float) else "write text, or remove it"
        )
        raise RowProblem(f"{name!r} is {kind} instead of text", mend=mend)
    if not empty and not value.strip():
        raise nothing_in(name)
    return value


def nothing_in(name: str) -> RowProblem:
    return RowProblem(f"{name!r} is empty", mend="fill it, or remove the row")


def _label(row: Row, name: str) -> str | int:
    value = row[name]
    if isinstance(value, str) and (label := value.strip()):
        return label
    if isinstance(value, float) and value.is_integer():  # Parquet writes columns with gaps so
        value = int(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowProblem(f"{name!r} is {kind} instead of a label", mend="a text or a whole number")
    raise nothing_in(name)


def answers_of(value: Any, name: str) -> list[str]:
    if value is None:  # a column with gaps
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RowProblem(f"{name!r} is no list of text", mend='["...", "..."]')
    return value


def _chat(row: Row, names: Mapping[str, str]) -> Row:
    key = "messages" if "messages" in names else "conversations"
    value = row.get(names[key])
    if isinstance(value, str):  # lists that went through a CSV file
        try:
            value = json.loads(value)
        except ValueError:
            raise RowProblem("messages that are text, not a list", show(value)) from None
    system = row.get(names["system"]) if "system" in names else None
    return {"messages": to_messages(value, system)}


def chat_shape(column: str) -> Shape:
    """Conversations in a column of any name."""
    return Shape(
        "as mapped",
        "chat",
        {column: ""},
        column,
        {},
        lambda row, _names: _chat(row, {"messages": column}),
    )


def _conversational(row: Row, names: Mapping[str, str]) -> Row:
    prompt, completion = row.get(names["prompt"]), row.get(names["completion"])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowProblem("prompt and completion are neither both text nor both messages")
    messages = to_messages([*prompt, *completion])
    for message in messages[: -len(completion)]:
        message["train"] = False
    return {"messages": messages}


def _alpaca_prompt(row: Row, names: Mapping[str, str]) -> str:
    parts = [text_of(row, names["instruction"], empty=True)]
    if "input" in names and row.get(names["input"]) is not None:
        parts.append(text_of(row, names["input"], empty=True))
    prompt = "\n".join(part for part in parts if part.strip())
    if not prompt:
        raise nothing_in(names["instruction"])
    return prompt


def _alpaca(row: Row, names: Mapping[str, str]) -> Row:
    return {"prompt": _alpaca_prompt(row, names), "completion": text_of(row, names["output"])}


def _alpaca_chat(row: Row, names: Mapping[str, str]) -> Row:
    history = row.get(names["history"]) if "history" in names else None
    system = row.get(names["system"]) if "system" in names else None
    pairs = turns(history, _alpaca_prompt(row, names), text_of(row, names["output"]))
    return {"messages": to_messages(pairs, system)}


def _pair(prompt: str, completion: str) -> Shape:
    columns = {prompt: "prompt", completion: "completion"}
    return Shape(f"{prompt}/{completion}", "prompt", columns, completion)


def _labelled(text: str, label: str, pair: str | None = None) -> Shape:
    pairs = {pair: "text_pair"} if pair else {}
    columns = {text: "text", **pairs, label: "label"}
    return Shape(
        "+".join([text, *([pair] if pair else []), label]), "classification", columns, label
    )


def _translated(source: str, target: str) -> Shape:
    columns = {source: "source", target: "target"}
    return Shape(f"{source}/{target}", "seq2seq", columns, target)


_ALPACA = {"instruction": "", "output": ""}
_PAIRS = (  # (prompt, completion) as data sets call them
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("problem", "solution"),
    ("mr", "ref"),  # E2E
    ("input", "output"),
)
_LABELS = ("label", "labels", "category", "intent", "sentiment", "class")
_TEXT_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)

SHAPES = (  # the first that fits is taken
    Shape("messages", "chat", {"messages": ""}, "messages", {"system": ""}, _chat),
    Shape("ShareGPT", "chat", {"conversations": ""}, "conversations", {"system": ""}, _chat),
    Shape("alpaca", "prompt", _ALPACA, "output", {"input": ""}, _alpaca),
    *(_pair(*names) for names in _PAIRS),
    *(_labelled(a, label, b) for a, b in _TEXT_PAIRS for label in _LABELS),
    _labelled("#1 string", "quality", "#2 string"),  # MRPC
    *(_labelled(text, label) for text in ("text", "sentence", "content") for label in _LABELS),
    *(_translated(*names) for names in (("source", "target"), ("document", "summary"))),
    *(_translated(*names) for names in (("article", "highlights"), ("dialogue", "summary"))),
    Shape("text", "text", {"text": "text"}, "text"),
    Shape("content", "text", {"content": "text"}, "content"),
)
# what a shape becomes when the rows ask for more than its canonical format can hold
ALPACA_CHAT = Shape(
    "alpaca", "chat", _ALPACA, "output", {"input": "", "system": "", "history": ""}, _alpaca_chat
)
CONVERSATIONAL = Shape(
    "prompt/completion of messages",
    "chat",
    {"prompt": "", "completion": ""},
    "completion",
    {},
    _conversational,
)


def _prompt_to_chat(row: Row) -> Row:
    further = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    roles = (("user", row["prompt"]), ("assistant", row["completion"]))
    return {"messages": [{"role": r, "content": c} for r, c in roles], **further}


def _renaming(names: Mapping[str, str]) -> Callable[[Row], Row]:
    return lambda row: {names.get(key, key): value for key, value in row.items()}


CONVERSIONS: dict[tuple[str, str | None], Callable[[Row], Row]] = {
    ("prompt", "chat"): _prompt_to_chat,
    ("prompt", "seq2seq"): _renaming({"prompt": "source", "completion": "target"}),
    ("seq2seq", "prompt"): _renaming({"source": "prompt", "target": "completion"}),
}

"""What people wrote in a row: its texts, its input, its output, and when two are the same."""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

_COLUMNS = ("prompt", "completion", "source", "target", "text", "text_pair")


def texts_of(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, text) of everything in a canonical row that people wrote."""
    for number, message in enumerate(row.get("messages") or (), start=1):
        if isinstance(message.get("content"), str):
            yield f"message {number} ({message['role']})", message["content"]
    for name in _COLUMNS:
        if isinstance(row.get(name), str):
            yield name, row[name]


def whole_text(row: Mapping[str, Any]) -> str:
    """All texts of a row, a line each."""
    return "\n".join(text for _, text in texts_of(row))


def input_of(row: Mapping[str, Any]) -> str:
    """What the model is given: everything but what it has to learn. Of running text the text."""
    if "messages" in row:
        return json.dumps(row["messages"][:-1], sort_keys=True)
    for key in ("prompt", "source"):
        if key in row:
            return str(row[key])
    return f"{row['text']}\n{row.get('text_pair', '')}"


def output_of(row: Mapping[str, Any]) -> str | None:
    """The text that is learned; None for classes and running text."""
    if "messages" in row:
        return row["messages"][-1]["content"]
    for key in ("completion", "target"):
        if key in row:
            return str(row[key])
    return None


def normalised(text: str) -> str:
    """The text without what seldom makes a difference: case, white space, forms of one sign."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

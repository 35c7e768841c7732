"""Conversations of other tools -> messages with role and content, in an order fit for training.

order of roles    [system] user assistant (user assistant)*
tools             assistant (with tool_calls) -> tool (one or more) -> assistant
"""

import json
from typing import Any

from lorica.data.problems import RowProblem, show

_ROLES = {  # words of ShareGPT, OpenAI, Anthropic, Vicuna -> ours
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_FOLLOWS = {  # role -> the roles that may come before it; "" is the start
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_ORDER = "[system] user assistant, then user assistant again; tool only after assistant"
_CONSUMED = ("role", "from", "content", "value", "weight", "train")


def to_messages(value: Any, system: Any = None) -> list[dict[str, Any]]:
    """Messages in canonical form.

    Args:
        value: a list of {"role", "content"} (OpenAI, Anthropic) or {"from", "value"} (ShareGPT). A
            message may say `"train": false`, or OpenAI's `"weight": 0`, to be left out of the loss.
        system: the text of a system message that stands beside the list.

    Raises:
        RowProblem: no list, no messages, an unknown role, content that is no text, roles in an
            order that cannot be trained on, or no assistant message to learn.
    """
    if not isinstance(value, list):
        raise _shape(f"a {_name(value)} instead of a list of messages")
    if not value:
        raise RowProblem("no messages", mend="remove the row, or write its messages")
    messages = [_message(item) for item in value]
    if system is not None and not (isinstance(system, str) and not system.strip()):
        if not isinstance(system, str):
            raise _shape(f'"system" is a {_name(system)} instead of text')
        messages.insert(0, {"role": "system", "content": system})
    check_order(messages)
    return messages


def check_order(messages: list[dict[str, Any]]) -> None:
    """Refuse an order of roles that templates reject or that leaves nothing to learn.

    Raises:
        RowProblem: see `to_messages`.
    """
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if before not in _FOLLOWS[role]:
            detail = f"message {number} is {role} after {before or 'the start'}"
            raise RowProblem("roles in an order that cannot be used", detail, mend=_ORDER)
        before = role
    if before != "assistant":
        raise RowProblem(
            "the last message is not the assistant's",
            f"it is {before}",
            mend="end each conversation with the answer to be learned",
        )
    if not any(m["role"] == "assistant" and m.get("train", True) for m in messages):
        raise RowProblem("no assistant message is trained", mend='remove "train": false from one')


def _shape(detail: str) -> RowProblem:
    return RowProblem(
        "messages of another shape", detail, mend='[{"role": "user", "content": "..."}, ...]'
    )


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _message(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise _shape(f"a message is a {_name(item)}")
    word = item.get("role", item.get("from"))
    role = _ROLES.get(word.strip().lower()) if isinstance(word, str) else None
    if role is None:
        what = show(word) if isinstance(word, str) else f"keys: {', '.join(map(str, item))}"
        known = "system, user, assistant, tool; in ShareGPT human, gpt"
        raise RowProblem("a message without a known role", what, mend=f"known: {known}")
    calls = bool(item.get("tool_calls"))
    message: dict[str, Any] = {"role": role, "content": _content(item, role, calls)}
    train = _train(item)
    if train is not None:
        message["train"] = train
    message.update({key: item[key] for key in item if key not in _CONSUMED})
    return message


def _content(item: dict[str, Any], role: str, calls: bool) -> str:
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(_block(block) for block in content)
    if content is None and calls:
        return ""
    if not isinstance(content, str):
        raise _shape(f"the content of {role} is {_name(content)} instead of text")
    if not content.strip() and role in ("user", "assistant") and not calls:
        raise RowProblem("a message without text", f"of {role}", mend="remove it, or the row")
    return content


def _block(block: Any) -> str:
    if isinstance(block, str):
        return block
    if (
        isinstance(block, dict)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
    ):
        return block["text"]
    kind = block.get("type") if isinstance(block, dict) else _name(block)
    raise RowProblem(
        "a content block that is no text", f"type {kind}", mend="keep text blocks only"
    )


def _train(item: dict[str, Any]) -> bool | None:
    given = [key for key in ("train", "weight") if key in item]
    if not given:
        return None
    value = item[given[0]]
    if value not in (0, 1):  # True and False are 1 and 0
        raise RowProblem(
            f'"{given[0]}" of a message is neither 0 nor 1', show(json.dumps(value)), mend="0 or 1"
        )
    return bool(value)


def turns(pairs: Any, last_user: str, last_assistant: str) -> list[dict[str, Any]]:
    """Alpaca's "history" (a list of [user, assistant]) and the last turn as messages."""
    messages = []
    for pair in pairs or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem('"history" of another shape', mend='[["question", "answer"], ...]')
        messages += [("user", pair[0]), ("assistant", pair[1])]
    messages += [("user", last_user), ("assistant", last_assistant)]
    return [{"role": role, "content": content} for role, content in messages]

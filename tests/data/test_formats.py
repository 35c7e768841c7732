"""Shapes of rows in the field become the five canonical formats; what does not fit says why."""

import json

import pytest

from lorica.data.read import from_rows
from lorica.data.shapes import CANONICAL, SHAPES
from lorica.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = [user("u"), assistant("a")]
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
OTHER = [user("v"), assistant("b")]
BLOCKS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

CONVERTED = [
    ({"messages": CHAT}, "chat", {"messages": CHAT}),
    ({"messages": CHAT, "system": "s"}, "chat", {"messages": [SYSTEM, *CHAT]}),
    ({"messages": json.dumps(CHAT)}, "chat", {"messages": CHAT}),
    ({"conversations": SHAREGPT}, "chat", {"messages": CHAT}),
    ({"conversations": SHAREGPT, "system": "s"}, "chat", {"messages": [SYSTEM, *CHAT]}),
    (
        {"messages": [user("u"), assistant(BLOCKS)]},
        "chat",
        {"messages": [user("u"), assistant("ab")]},
    ),
    (
        {"messages": [user("u"), assistant("a", weight=0), user("v"), assistant("b", weight=1)]},
        "chat",
        {
            "messages": [
                user("u"),
                assistant("a", train=False),
                user("v"),
                assistant("b", train=True),
            ]
        },
    ),
    (
        {"messages": [{"role": "developer", "content": "s"}, *CHAT]},
        "chat",
        {"messages": [SYSTEM, *CHAT]},
    ),
    (
        {"instruction": "i", "input": "", "output": "o"},
        "prompt",
        {"prompt": "i", "completion": "o"},
    ),
    (
        {"instruction": "i", "input": "x", "output": "o"},
        "prompt",
        {"prompt": "i\nx", "completion": "o"},
    ),
    (
        {"instruction": "i", "output": "o", "system": "s", "history": [["u", "a"]]},
        "chat",
        {"messages": [SYSTEM, *CHAT, user("i"), assistant("o")]},
    ),
    (
        {"instruction": "i", "output": "o", "system": "", "history": []},
        "prompt",
        {"prompt": "i", "completion": "o", "system": "", "history": []},
    ),
    ({"prompt": "", "completion": "c"}, "prompt", {"prompt": "", "completion": "c"}),
    (
        {"prompt": [user("u")], "completion": [assistant("a")]},
        "chat",
        {"messages": CHAT},
    ),
    ({"query": "q", "response": "r"}, "prompt", {"prompt": "q", "completion": "r"}),
    ({"question": "q", "answer": "a"}, "prompt", {"prompt": "q", "completion": "a"}),
    ({"mr": "m", "ref": "r"}, "prompt", {"prompt": "m", "completion": "r"}),
    ({"text": "t", "label": 3}, "classification", {"text": "t", "label": 3}),
    ({"text": "t", "label": " pos "}, "classification", {"text": "t", "label": "pos"}),
    ({"text": "t", "label": True}, "classification", {"text": "t", "label": 1}),
    ({"sentence": "t", "label": "1"}, "classification", {"text": "t", "label": "1"}),
    (
        {"index": 0, "sentence1": "a", "sentence2": "b", "label": "x"},
        "classification",
        {"text": "a", "text_pair": "b", "label": "x", "index": 0},
    ),
    (
        {"premise": "a", "hypothesis": "b", "label": 2},
        "classification",
        {"text": "a", "text_pair": "b", "label": 2},
    ),
    (
        {"Quality": "1", "#1 String": "a", "#2 String": "b"},
        "classification",
        {"text": "a", "text_pair": "b", "label": "1"},
    ),
    ({"source": "s", "target": "t"}, "seq2seq", {"source": "s", "target": "t"}),
    ({"document": "d", "summary": "s"}, "seq2seq", {"source": "d", "target": "s"}),
    ({"text": "t", "meta": {"a": [1]}}, "text", {"text": "t", "meta": {"a": [1]}}),
    ({"Prompt ": "a", "COMPLETION": "b"}, "prompt", {"prompt": "a", "completion": "b"}),
    (
        {"prompt": "p", "completion": "c", "references": "c2", "slots": ["x"]},
        "prompt",
        {"prompt": "p", "completion": "c", "references": ["c2"], "slots": ["x"]},
    ),
]


@pytest.mark.parametrize(("row", "format", "expected"), CONVERTED, ids=range(len(CONVERTED)))
def test_conversion(row, format, expected):
    dataset = from_rows([row])
    if expected.get("messages") and isinstance(row.get("prompt"), list):
        assert dataset[0]["messages"][0]["train"] is False
        dataset[0]["messages"][0].pop("train")
    assert dataset.format == format and dataset.rows == [expected]


def test_statement_says_what_was_seen_and_made():
    row = {"instruction": "i", "input": "x", "output": "o"}
    statement = from_rows([row]).statement
    assert "3 columns seen: instruction, input, output -> alpaca -> prompt/completion" in statement
    statement = from_rows([{"text": "t", "id": 1}]).statement
    assert "2 columns seen: text, id -> text; kept as they are: id" in statement
    statement = from_rows([{"question": "q", "answer": "a", "prompt": "hidden"}]).statement
    assert "left out, the name is needed: prompt" in statement


def test_a_column_of_a_late_row_cannot_replace_a_canonical_one():
    rows = [{"question": "q", "answer": "a"}] * 3 + [
        {"question": "q", "answer": "a", "prompt": "x"}
    ]
    assert from_rows(rows)[3] == {"prompt": "q", "completion": "a"}


def test_explicit_columns():
    rows = [{"a": "x", "b": "y", "c": "z", "text": "t"}]
    dataset = from_rows(rows, columns={"prompt": "a", "completion": "b"})
    assert dataset[0] == {"prompt": "x", "completion": "y", "c": "z", "text": "t"}
    dataset = from_rows(rows, columns={"source": "a", "target": "b", "references": "c"})
    assert dataset.format == "seq2seq" and dataset[0]["references"] == ["z"]
    dataset = from_rows(rows, columns={"text": "a", "text_pair": "b", "label": "c"})
    assert dataset[0] == {"text": "x", "text_pair": "y", "label": "z"}
    dataset = from_rows([{"turns": CHAT, "n": 1}], columns={"messages": "turns"})
    assert dataset[0] == {"messages": CHAT, "n": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "a", "completion": "b"}, "'promt'; did you mean 'prompt'?"),
        ({"prompt": "aa", "completion": "b"}, "'aa'"),
        ({"prompt": "a"}, "columns for prompt make no format"),
        ({"prompt": "a", "completion": "a"}, "mapped to two names"),
        ({"references": "a"}, "columns for nothing make no format"),
    ],
)
def test_wrong_mappings(columns, message):
    with pytest.raises(DataError) as caught:
        from_rows([{"a": "x", "b": "y"}], columns=columns)
    assert message in str(caught.value)


def test_format_asked_for():
    row = {"prompt": "p", "completion": "c", "text": "t", "label": 1, "id": 5}
    assert from_rows([row]).format == "prompt"
    assert from_rows([row], format="text")[0]["text"] == "t"
    assert from_rows([row], format="classification")[0]["label"] == 1
    assert from_rows([row], format="seq2seq")[0]["source"] == "p"
    chat = from_rows([{"prompt": "p", "completion": "c", "id": 5}], format="chat")
    assert chat[0] == {"messages": [user("p"), assistant("c")], "id": 5}
    assert "-> prompt/completion -> messages; kept" in chat.statement
    back = from_rows([{"source": "s", "target": "t"}], format="prompt")
    assert back[0] == {"prompt": "s", "completion": "t"}
    alpaca = {"instruction": "i", "output": "o", "system": None}
    assert from_rows([alpaca], format="chat")[0] == {"messages": [user("i"), assistant("o")]}
    assert from_rows([alpaca], format="alpaca").format == "prompt"
    with pytest.raises(DataError, match="did you mean 'prompt'"):
        from_rows([row], format="promt")
    with pytest.raises(DataError, match="do not say what to learn"):
        from_rows([{"text": "t"}], format="chat")


def test_unknown_columns_list_what_was_found_and_the_nearest():
    with pytest.raises(DataError) as caught:
        from_rows([{"promt": "a", "completions": "b"}])
    text = str(caught.value)
    assert "columns found: promt, completions" in text
    assert "'promt' is near 'prompt'" in text and "'completions' is near 'completion'" in text
    assert 'columns={"prompt"' in text


BAD_CHATS = [
    ([], "no messages"),
    ([assistant("a")], "message 1 is assistant after the start"),
    ([user("u"), user("v"), assistant("a")], "message 2 is user after user"),
    ([user("u"), assistant("a"), assistant("b")], "message 3 is assistant after assistant"),
    ([user("u"), SYSTEM, assistant("a")], "message 2 is system after user"),
    ([user("u")], "the last message is not the assistant's"),
    ([user("u"), assistant("a"), user("v")], "the last message is not the assistant's"),
    ([SYSTEM], "the last message is not the assistant's"),
    ([user("u"), {"role": "wizard", "content": "a"}], "a message without a known role"),
    ([user("u"), {"content": "a"}], "keys: content"),
    ([user("u"), "a"], "a message is a str"),
    ([user("u"), assistant(None)], "the content of assistant is null"),
    ([user("u"), assistant("  ")], "a message without text"),
    ([user(""), assistant("a")], "a message without text"),
    ([user("u"), assistant("a", train=False)], "no assistant message is trained"),
    ([user("u"), assistant("a", weight=2)], '"weight" of a message is neither 0 nor 1'),
    ([user("u"), assistant([{"type": "image", "source": {}}])], "type image"),
    ("not json", "messages that are text, not a list"),
    ({"role": "user"}, "a dict instead of a list of messages"),
    (None, "a null instead of a list of messages"),
]


@pytest.mark.parametrize(("messages", "text"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_bad_conversations(messages, text):
    with pytest.raises(DataError) as caught:
        from_rows([{"messages": messages}])
    assert text in str(caught.value) and "rows:1" in str(caught.value)


def test_tool_calls():
    messages = [
        user("u"),
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        assistant("a"),
    ]
    row = from_rows([{"messages": messages, "tools": [{"name": "f"}]}])[0]
    assert [m["role"] for m in row["messages"]] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert row["messages"][1]["content"] == "" and row["messages"][1]["tool_calls"]
    assert row["tools"] == [{"name": "f"}]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "t", "label": None}, "'label' is null instead of a label"),
        ({"text": "t", "label": ""}, "'label' is empty"),
        ({"text": "t", "label": 0.5}, "'label' is float instead of a label"),
        ({"prompt": "p", "completion": " "}, "'completion' is empty"),
        ({"prompt": "p", "completion": 4}, "'completion' is int instead of text"),
        ({"prompt": None, "completion": "c"}, "'prompt' is null"),
        ({"instruction": "", "input": " ", "output": "o"}, "'instruction' is empty"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'input' is int"),
        ({"prompt": [user("u")], "completion": "c"}, "neither both text nor both messages"),
        ({"prompt": "p", "completion": "c", "references": [1]}, "'references' is no list of text"),
        ({"instruction": "i", "output": "o", "history": [["u"]]}, '"history" of another shape'),
    ],
)
def test_bad_values(row, text):
    with pytest.raises(DataError) as caught:
        from_rows([row])
    assert text in str(caught.value)


def test_every_shape_in_the_table_is_found_by_its_own_columns():
    for shape in SHAPES:
        assert shape.format in CANONICAL and shape.target in shape.columns
        if shape.convert is None:
            row = dict.fromkeys(shape.columns, "x")
            made = from_rows([row], format=shape.name)
            assert made.format == shape.format, shape.name
            assert set(made[0]) >= set(CANONICAL[shape.format][0])


def test_each_missing_column_is_named_once():
    with pytest.raises(DataError) as caught:
        from_rows([{"a": "x", "b": "y"}], columns={"prompt": "mr", "completion": "ref"})
    text = str(caught.value)
    assert text.count("'mr'") == text.count("'ref'") == 1
    assert "names among a, b" in text

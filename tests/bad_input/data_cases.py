"""D: files of records."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path

from bad_input.case import Case
from data.chat_templates import CHATML, byte_tokenizer
from lorica.cli.material import gather
from lorica.config import RunConfig
from lorica.data import json_rows
from lorica.data.encode import CausalEncoder
from lorica.data.findings import Finding
from lorica.data.read import Dataset, from_rows, read, read_splits
from lorica.data.screen import screen_quickly
from lorica.data.source import open_regular
from lorica.errors import DataError, LoricaError

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def given(raw: bytes | str | dict, ending: str = ".jsonl", **how: object) -> Callable:
    """A file with these bytes (a dict: one row), to be read."""

    def act(folder: Path) -> str:
        path = folder / f"a{ending}"
        text = json.dumps(raw) if isinstance(raw, dict) else raw
        path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        return read(path, **how).statement  # type: ignore[arg-type]

    return act


def equal(*files: tuple[str, bytes]) -> Callable:
    """Files that are the same records."""

    def act(folder: Path) -> str:
        found = []
        for name, raw in files:
            (folder / name).write_bytes(raw)
            found.append(read(folder / name))
        assert all(one.rows == found[0].rows for one in found)
        assert len({one.digest for one in found}) == 1
        return f"accepted: {len(found)} spellings, one digest"

    return act


def chat(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


def at(make: Callable[[Path], object], ending: str = ".jsonl") -> Callable:
    """Something that is no plain file."""

    def act(folder: Path) -> str:
        make(folder / f"a{ending}")
        began = time.monotonic()
        try:
            return read(folder / f"a{ending}").statement
        finally:
            assert time.monotonic() - began < 3

    return act


def sparse(gigabytes: int) -> Callable:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, gigabytes << 30)

    return make


def _long_row(folder: Path) -> str:
    """10 MB in a row are read, and the truncation is told."""
    path = folder / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "bc " * 3_500_000}), encoding="utf-8")
    found = read(path)
    assert len(found.rows[0]["completion"]) == 10_500_000
    short = read_one({"prompt": "a", "completion": "bc " * 400})
    encoded = CausalEncoder(byte_tokenizer(), max_length=64).encode(short)
    return f"{found.statement}; {encoded.statement()}"


def read_one(row: dict) -> Dataset:
    return from_rows([row])


def _many_messages(folder: Path) -> str:
    return given(chat(*["user", "assistant"] * 50_000))(folder)


def _masked(folder: Path) -> str:
    """A prompt that fills the length: it is cut, so that something is left to learn."""
    row = {"prompt": "p" * 500, "completion": "yes"}
    encoded = CausalEncoder(byte_tokenizer(), max_length=32).encode(read_one(row))
    assert encoded[0].num_trained > 0
    return encoded.statement()


def _forged(folder: Path) -> str:
    """1,000 texts with control tokens in them: no more control ids than the template itself has."""
    tokenizer, rng = byte_tokenizer(CHATML), random.Random(0)
    control = ["<|im_start|>", "<|im_end|>", "</s>", "<s>"]
    ids = {tokenizer.convert_tokens_to_ids(word) for word in control}

    texts = ["hello"]
    for _ in range(1_000):
        words = rng.choices([*control, "hi", "\n", "assistant", " "], k=rng.randrange(1, 8))
        texts.append("x" + "".join(words))
    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [{"role": "user", "content": text}, answer]} for text in texts]
    encoded = CausalEncoder(tokenizer, max_length=None).encode(from_rows(rows))
    counts = {sum(token in ids for token in example.input_ids) for example in encoded}
    assert len(encoded) == len(texts) and len(counts) == 1
    number = counts.pop()
    return f"1,000 texts that spell control tokens: {number} control ids in each, as in plain text"


def _strange_letters(folder: Path) -> str:
    tokenizer = byte_tokenizer()
    texts = [
        "e\u0301 \u00e9",
        "\u202eabc\u202c",
        "a\u200bb\ufeff",
        "\U0001f600",
        "e" + "\u0301" * 999,
    ]
    for text in texts:
        row = read_one({"prompt": "a", "completion": text}).rows[0]
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    return "accepted, and decoded again to the same text"


def _changed_while_read(folder: Path) -> str:
    path = folder / "a.jsonl"
    path.write_bytes(GOOD)
    with open_regular(path) as file:
        json_rows.read_jsonl(file, "a.jsonl", json_rows.Wish(), json_rows.Problems())
        path.write_bytes(GOOD * 2)
    return "unseen"


def _told(findings: list[Finding]) -> str:
    return "; ".join(finding.text for finding in findings)


def _repeated(folder: Path) -> str:
    rows = [{"prompt": f"Question  {i % 9}", "completion": f"answer {i % 9}"} for i in range(18)]
    rows[-1] = {"prompt": "question 8", "completion": "ANSWER 8"}
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read(path)
    return f"{found.statement}; {_told(screen_quickly(found, []))}"


def _leaked(folder: Path) -> str:
    for name, first in (("train", 0), ("valid", 15)):
        rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(first, first + 20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = read_splits(folder)
    return _told(screen_quickly(parts["train"], [parts["valid"]]))


def _script(folder: Path) -> str:
    (folder / "loader.py").write_text("raise SystemExit('executed')")
    (folder / "rows.pkl").write_bytes(pickle.dumps([1]))
    (folder / "rows.arrow").write_bytes(b"ARROW1\0\0")
    return read(folder).statement


def _one_row(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(GOOD)
    return "; ".join(gather(RunConfig(model="m", data=str(folder / "a.jsonl")), seed=0).statements)


def _empty_part(folder: Path) -> str:
    (folder / "train.jsonl").write_bytes(GOOD)
    (folder / "valid.jsonl").write_bytes(b"")
    return str(read_splits(folder))


def _one_class(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": "a", "label": "x"}\n' * 30)
    findings = screen_quickly(read(folder / "a.jsonl"), [])
    assert any(finding.severity == "refuse" for finding in findings)
    return _told(findings)


def _new_class(folder: Path) -> str:
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(30)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "valid.jsonl").write_text('{"text": "u", "label": "z"}\n')
    parts = read_splits(folder)
    return _told(screen_quickly(parts["train"], [parts["valid"]]))


def _skipped(folder: Path) -> str:
    return given(GOOD * 3 + b'{"prompt": "a", "completion": ""}\n' * 2, max_bad_rows=2)(folder)


def _mutated(folder: Path) -> str:
    """Sound rows with single bytes changed, 5,000 of them: an error or rows, nothing else."""
    rng, refused = random.Random(0), 0
    for _ in range(250):
        lines = []
        for _ in range(20):
            line = bytearray(GOOD)
            line[rng.randrange(len(line))] = rng.randrange(256)
            lines.append(bytes(line))
        try:
            given(b"".join(lines))(folder)
        except LoricaError:
            refused += 1
    return f"5,000 changed rows in 250 files: {refused} files refused, no other exception"


def _row(id: str, name: str, act: Callable, *says: str) -> Case:
    return Case(id, name, act, DataError, says)


def _fine(id: str, name: str, act: Callable, *says: str) -> Case:
    return Case(id, name, act, None, says)


BOM = b"\xef\xbb\xbf"
WIDE = GOOD.decode().encode
PAIR = '"prompt": "a", "completion": "b"'
CASES = (
    _fine("D-01", "UTF-8 byte order mark", equal(("a.jsonl", BOM + GOOD), ("b.jsonl", GOOD)), "2"),
    _fine("D-02", "UTF-16 with a mark", equal(("a.jsonl", WIDE("utf-16")), ("b.jsonl", GOOD))),
    _fine("D-02", "UTF-32 with a mark", equal(("a.jsonl", WIDE("utf-32")), ("b.jsonl", GOOD))),
    _row("D-02", "UTF-16 without a mark", given(WIDE("utf-16-le")), "UTF-16", "convert"),
    _row("D-02", "UTF-16 cut off", given(WIDE("utf-16")[:-1]), "is not UTF-16", "cut off"),
    _row(
        "D-03",
        "Latin-1 JSONL",
        given(GOOD + '{"prompt": "é"}'.encode("latin-1")),
        ":2",
        "byte 0xe9",
        "iconv",
    ),
    _row(
        "D-03",
        "Latin-1 CSV",
        given("text\né\n".encode("latin-1"), ".csv"),
        "a.csv:2",
        "byte 0xe9 at byte 5",
    ),
    _row("D-04", "NUL byte", given(GOOD + b'{"prompt": "a\0"}'), "NUL", ":2:14"),
    _row("D-04", "NUL as an escape", given('{"prompt": "a\\u0000", "completion": "b"}'), "NUL"),
    _fine(
        "D-04",
        "other control characters",
        given('{"prompt": "a\\u0007", "completion": "b"}'),
        "1 row with control characters (kept)",
    ),
    _fine(
        "D-05",
        "CRLF, CR, no last newline, blank lines",
        equal(
            ("a.jsonl", GOOD * 2),
            ("b.jsonl", (GOOD * 2).replace(b"\n", b"\r\n")),
            ("c.jsonl", (GOOD * 2).replace(b"\n", b"\r")),
            ("d.jsonl", (GOOD * 2)[:-1]),
            ("e.jsonl", GOOD * 2 + b"\n \n\n"),
        ),
        "5 spellings",
    ),
    _fine(
        "D-06",
        "U+2028, U+2029, U+0085 in a text",
        given('{"prompt": "a\u2028b\u2029c\u0085d", "completion": "b"}\n'),
        "1 row;",
    ),
    _row("D-07", "last line cut off", given(GOOD + b'{"prompt": "a", "comp'), ":2:", "cut off"),
    _row("D-07", "comma before the bracket", given('{"prompt": "a",}'), "remove the comma"),
    _row("D-07", "single quotes", given("{'prompt': 'a'}"), "double quotes"),
    _row("D-07", "two objects on a line", given(GOOD.strip() + GOOD), "break the line"),
    _row("D-07", "an array in a .jsonl", given(b"[" + GOOD.strip() + b"]"), "name the file .json"),
    _row(
        "D-07",
        "an array over lines in a .jsonl",
        given(b"[\n" + GOOD + b"]"),
        "name the file .json",
    ),
    *(
        _row("D-08", f"the number {n}", given(f'{{{PAIR}, "x": {n}}}'), "JSON does not have", n)
        for n in ("NaN", "Infinity", "-Infinity", "1e999")
    ),
    _row(
        "D-09",
        "a key twice",
        given('{"prompt": "a", "prompt": "c", "completion": "b"}'),
        "stands twice",
    ),
    _row(
        "D-09",
        "a key twice, deeper",
        given(f'{{{PAIR}, "x": {{"y": 1, "y": 2}}}}'),
        "stands twice",
        "y",
    ),
    _row(
        "D-10",
        "10,000 levels, JSONL",
        given('{"prompt": ' + "[" * 10_000 + "]" * 10_000 + "}"),
        "nested too deeply",
    ),
    _row("D-10", "10,000 levels, JSON", given("[" * 10_000, ".json"), "nested too deeply"),
    _row("D-10", "100,000 digits", given(f'{{{PAIR}, "x": {"1" * 100_000}}}'), "too long"),
    _row(
        "D-11",
        "half a surrogate pair",
        given('{"prompt": "\\ud800", "completion": "b"}'),
        "surrogate",
        "\\ud800",
    ),
    _row(
        "D-11",
        "half a surrogate in UTF-8",
        given(b'{"prompt": "\xed\xa0\x80", "completion": "b"}'),
        "not UTF-8",
    ),
    _row(
        "D-12",
        "a typo in a name",
        given({"promt": "a", "completion": "b"}),
        "'promt' is near 'prompt'",
    ),
    _row(
        "D-12",
        "a typo in the target",
        given({"question": "a", "awnser": "b"}),
        "'awnser' may be meant",
    ),
    _fine("D-12", "another case", given({"Prompt": "a", "COMPLETION": "b"}), "prompt/completion"),
    _fine(
        "D-12",
        "a further field",
        given({"prompt": "a", "completion": "b", "id": 7}),
        "kept as they are: id",
    ),
    _row(
        "D-12",
        "a field missing in a row",
        given(GOOD * 3 + b'{"prompt": "a", "Completion": "b"}\n'),
        ":4",
        "'Completion' may be meant",
    ),
    *(
        _row(
            "D-12",
            f"{kind} for text",
            given({"prompt": "a", "completion": value}),
            f"is {kind} instead of text",
        )
        for kind, value in (
            ("null", None),
            ("int", 3),
            ("list", ["b"]),
            ("bool", True),
            ("dict", {"x": 1}),
        )
        if kind != "list"
    ),
    _row("D-12", "a list for text", given({"text": ["b"]}), "is list instead of text"),
    _row("D-13", "an empty text", given({"prompt": "a", "completion": ""}), "is empty"),
    _row("D-13", "white space only", given({"text": " \n\t"}), "is empty"),
    _row("D-13", "no messages", given({"messages": []}), "no messages"),
    _row(
        "D-13",
        "a message without text",
        given({"messages": [{"role": "user", "content": ""}]}),
        "without text",
    ),
    _fine(
        "D-13",
        "bad rows, allowed by max_bad_rows",
        _skipped,
        "2 unusable rows left out (first lines: 4, 5)",
    ),
    _fine("D-14", "10 MB in a row", _long_row, "1 row;", "1 example"),
    _row("D-14", "17 MB in a row", given({"text": "x" * 17_000_000}), "more than 16 MiB"),
    _row(
        "D-14",
        "17 MB in a row, CSV",
        given("text\n" + "x" * 17_000_000, ".csv"),
        "field limit",
        "divide",
    ),
    _row("D-14", "17 MB in a row, text", given("x" * 17_000_000, ".txt"), "more than 16 MiB"),
    _row("D-14", "1 GB in a line", at(sparse(1)), "more than 16 MiB"),
    _fine("D-14", "100,000 messages in a row", _many_messages, "1 row;"),
    _row(
        "D-15",
        "rows of other lengths",
        given("text,label\na,b,c\na\n", ".csv"),
        "a.csv:2 3 instead of 2",
        "a.csv:3 1 instead of 2",
    ),
    _row(
        "D-15",
        "a quote that never closes",
        given('text,label\n"a,b\n', ".csv"),
        "never closes",
        "a.csv:2",
    ),
    _row(
        "D-15",
        "text behind a quote",
        given('text,label\n"a"x,b\n', ".csv"),
        "cannot be read",
        "close the quote",
    ),
    _fine("D-15", "semicolons", given("text;label\na;b\n", ".csv"), "columns parted by semicolons"),
    _fine("D-15", "line breaks in quotes", given('text,label\n"a\nb",c\n', ".csv"), "1 row;"),
    _fine(
        "D-15",
        "a field of 131,073 letters",
        given("text,label\na," + "x" * 131_073, ".csv"),
        "1 row;",
    ),
    _row(
        "D-15",
        "no header",
        given("one,two\nthree,four\n", ".csv"),
        "columns found: one, two",
        "without a header",
    ),
    _row("D-15", "a column twice", given("text,text\na,b\n", ".csv"), "names a column twice: text"),
    _row(
        "D-15", "the header again", given("text,label\ntext,label\na,b\n", ".csv"), "header again"
    ),
    _fine("D-15", "formulas", given("text,label\n=1+1,@SUM(A1)\n", ".csv"), "1 row;"),
    *(
        _row("D-16", f"roles: {', '.join(roles)}", given(chat(*roles)), words)
        for roles, words in (
            (("assistant",), "message 1 is assistant after the start"),
            (("user", "user", "assistant"), "message 2 is user after user"),
            (("user",), "the last message is not the assistant's"),
            (("user", "system", "assistant"), "message 2 is system after user"),
            (("user", "wizard"), "wizard"),
            (("user", "assistant", "user"), "the last message is not the assistant's"),
            (("system", "assistant"), "message 2 is assistant after system"),
            (("tool", "assistant"), "message 1 is tool after the start"),
        )
    ),
    _row(
        "D-16",
        "no turn that is trained",
        given(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "train": False},
                ]
            }
        ),
        "no assistant message is trained",
    ),
    _fine("D-17", "a prompt that fills the length", _masked, "1 example"),
    _fine("D-18", "repeated rows", _repeated, "repeating an earlier one", "repeat"),
    _fine("D-18", "evaluation records in training", _leaked, "5 of 20"),
    _fine("D-19", "control tokens in the text of a user", _forged, "1,000 texts"),
    _fine("D-20", "combining, bidi, zero-width, emoji", _strange_letters, "same text"),
    _row("D-21", "gzip under another name", given(gzip.compress(GOOD * 9)), "packed with gzip"),
    _row(
        "D-21",
        "zstandard under another name",
        given(b"\x28\xb5\x2f\xfd", ".csv"),
        "packed with zstandard",
    ),
    _row("D-21", ".jsonl.gz", given(gzip.compress(GOOD), ".jsonl.gz"), "are not read"),
    _row("D-21", "10 GB without content, JSONL", at(sparse(10)), "more than 16 MiB"),
    _row("D-21", "10 GB without content, CSV", at(sparse(10), ".csv"), "larger than 2 GiB"),
    _row("D-21", "a FIFO", at(os.mkfifo), "is a FIFO"),
    _row("D-21", "/dev/zero", at(lambda path: path.symlink_to("/dev/zero")), "a character device"),
    _row("D-21", "an empty folder", at(Path.mkdir), "holds no data files"),
    _row(
        "D-21", "a loop of links", at(lambda path: path.symlink_to(path)), "loop of symbolic links"
    ),
    _row(
        "D-21",
        "a path of 5,000 letters",
        lambda folder: read(folder / ("x" * 5_000)),
        "File name too long",
    ),
    _row("D-22", "a script, a pickle, an arrow file", _script, "holds no data files"),
    _row("D-22", "a pickle under another name", given(pickle.dumps([{"text": "a"}])), "NUL"),
    _row(
        "D-22",
        "a broken Parquet file",
        given(b"PAR1" + b"x" * 99 + b"PAR1", ".parquet"),
        "no readable Parquet",
    ),
    _row(
        "D-23",
        "changed while it is read",
        _changed_while_read,
        "was changed while it was being read",
    ),
    _row("D-24", "no rows, JSONL", given(""), "holds no rows"),
    _row("D-24", "no rows, CSV", given("text,label\n", ".csv"), "holds no rows"),
    _row("D-24", "no rows, JSON", given("[]", ".json"), "holds no rows"),
    _fine("D-24", "one row", _one_row, "1 row", "nothing is held out"),
    _row("D-24", "an empty evaluation part", _empty_part, "valid.jsonl holds no rows"),
    _row(
        "D-25",
        "preference pairs",
        given({"prompt": "a", "chosen": "b", "rejected": "b"}),
        "preferred",
        "chosen",
    ),
    _fine("D-25", "one class only", _one_class, "x"),
    _fine("D-25", "a class in the evaluation only", _new_class, "z"),
    _fine("D", "5,000 rows, each with a byte changed", _mutated, "no other exception"),
)

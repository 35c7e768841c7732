"""Reading files: kinds, encodings, splits, and errors that name every problem with its place."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorica.data import source
from lorica.data.read import digest_of, from_rows, group_references, read, read_splits
from lorica.errors import DataError, LoricaError, MissingPackage

PAIR = {"prompt": "a", "completion": "b"}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, rows: list) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refused(path: Path, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **kwargs)
    return str(caught.value)


# kinds of files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'),
        ("a.ndjson", '{"prompt": "a", "completion": "b"}\r\n{"prompt": "c", "completion": "d"}'),
        (
            "lone_cr.jsonl",
            '{"prompt": "a", "completion": "b"}\r{"prompt": "c", "completion": "d"}\r',
        ),
        (
            "blank.jsonl",
            '\n{"prompt": "a", "completion": "b"}\n \n{"prompt":"c","completion":"d"}\n\n',
        ),
        ("a.json", '[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]'),
        (
            "d.json",
            '{"v": 1, "data": [{"prompt":"a","completion":"b"},{"prompt":"c","completion":"d"}]}',
        ),
        ("lines.json", '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'),
        ("a.csv", "prompt,completion\na,b\nc,d\n"),
        ("semicolon.csv", "prompt;completion\r\na;b\r\nc;d\r\n"),
        ("a.tsv", "prompt\tcompletion\na\tb\nc\td"),
        ("lone_cr.tsv", "prompt\tcompletion\ra\tb\rc\td\r"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_same_rows_and_digest_from_every_kind(tmp_path, name, text, encoding):
    dataset = read(write(tmp_path / name, text.encode(encoding)))
    assert dataset.rows == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert dataset.format == "prompt"
    assert dataset.digest == from_rows(dataset.rows).digest
    assert "prompt, completion -> prompt/completion" in dataset.statement


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = arrow.table(
        {
            "text": ["x", "y"],
            "label": [1.0, 2.0],
            "when": arrow.array([1, 2], type=arrow.timestamp("s")),
            "tags": [["a"], []],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    dataset = read(tmp_path / "a.parquet")
    assert dataset.rows[0] == {"text": "x", "label": 1, "tags": ["a"]}
    assert "column when left out" in dataset.statement
    assert "no readable Parquet" in refused(write(tmp_path / "b.parquet", b"PAR1 but not really"))


def test_absent_package_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"lorica\[parquet\]"):
        read(write(tmp_path / "a.parquet", b"PAR1"))


def test_line_separators_inside_strings_do_not_break_rows(tmp_path):
    text = "one\u2028two\u2029three\u0085four"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert read(path).rows == [{"text": text}]


def test_quoted_newlines_long_fields_and_formulas(tmp_path):
    long = "x" * 200_000
    rows = [["prompt", "completion"], ["a\nb, c", 'say "hi"'], ["=1+1", long]]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    limit = csv.field_size_limit()
    dataset = read(write(tmp_path / "a.csv", buffer.getvalue()))
    assert [list(row.values()) for row in dataset] == rows[1:]
    assert dataset.origins == [(str(tmp_path / "a.csv"), 2), (str(tmp_path / "a.csv"), 4)]
    assert csv.field_size_limit() == limit


def test_quotes_in_tsv_are_text_unless_all_enclose(tmp_path):
    open_quote = 'sentence\tlabel\n" an open quote\t1\n"all of it"\t0\n'
    dataset = read(write(tmp_path / "a.tsv", open_quote))
    assert dataset[0]["text"] == '" an open quote' and "quotes are text" in dataset.statement
    enclosed = 'sentence\tlabel\n"a ""b""\nc"\t1\nd\t0\n'
    dataset = read(write(tmp_path / "b.tsv", enclosed))
    assert dataset[0]["text"] == 'a "b"\nc' and "quotes enclose" in dataset.statement


def test_header_without_a_name_and_without_a_header(tmp_path):
    dataset = read(write(tmp_path / "a.csv", ",text,label\n0,good,1\n1,bad,0\n"))
    assert dataset[0] == {"text": "good", "label": "1", "column 0": "0"}
    path = write(tmp_path / "b.tsv", "gj04\t1\t\tThe sentence.\ngj04\t0\t*\tAnother\n")
    assert "without a header is mapped by places" in refused(path)
    dataset = read(path, columns={"text": "3", "label": "1"})
    assert dataset[0]["text"] == "The sentence." and len(dataset) == 2


def test_running_text(tmp_path):
    paragraphs = [f"Paragraph {n} " + "word " * 60 for n in range(30)]
    path = write(tmp_path / "a.txt", "\ufeff" + "\r\n\r\n".join(paragraphs))
    dataset = read(path)
    assert "\n\n".join(row["text"] for row in dataset) == "\n\n".join(paragraphs)
    assert max(len(row["text"]) for row in dataset) <= 2_000
    assert dataset.origins[1][1] == 1 + 2 * dataset[0]["text"].count("\n\n") + 2
    lines = write(tmp_path / "b.txt", "\n".join(f"line {n}" for n in range(900)))
    assert "\n".join(row["text"] for row in read(lines)) == lines.read_text()
    marked = write(tmp_path / "c.txt", "one\n\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n")
    assert [row["text"] for row in read(marked)] == ["one\n\ntwo", "three"]
    assert read(marked).origins[1] == (str(marked), 6)


def test_limit_and_sample(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(100)])
    assert [row["text"] for row in read(path, limit=3)] == ["row 0", "row 1", "row 2"]
    sample = read(f"{path}#10")
    assert len(sample) == 10 and sample.rows == read(f"{path}#10").rows
    assert "10 of 100 rows sampled" in sample.statement
    assert len(read(f"{path}#1000")) == 100
    assert "no number of rows" in refused(f"{path}#ten")
    with_mark = jsonl(tmp_path / "b#5.jsonl", [{"text": "x"}])
    assert len(read(with_mark)) == 1
    assert "limit is 0" in refused(path, limit=0)


def test_dataset_is_a_sequence(tmp_path):
    dataset = from_rows([{"text": str(n)} for n in range(5)])
    assert dataset[1:3] == [{"text": "1"}, {"text": "2"}] and dataset[-1] == {"text": "4"}
    subset = dataset.subset([4, 0], "the last first")
    assert subset.rows == [{"text": "4"}, {"text": "0"}] and subset.origins[0] == ("rows", 5)
    assert "the last first" in subset.statement and subset.digest != dataset.digest
    assert digest_of([{"a": 1, "b": 2}]) == digest_of([{"b": 2, "a": 1}])
    many = [{"text": str(n)} for n in range(2500)]
    assert digest_of(many) != digest_of(many[:-1])


# folders, splits, standard input, hub


def test_folder_of_files_is_one_set(tmp_path):
    jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    write(tmp_path / "a.txt", "1")
    write(tmp_path / "README.txt", "no data")
    write(tmp_path / ".hidden.jsonl", "no data")
    dataset = read(tmp_path)
    assert [row["text"] for row in dataset] == ["1", "2"] and "2 files" in dataset.statement
    assert "not read: README.txt" in dataset.statement
    assert list(read_splits(tmp_path)) == ["train"]


def test_splits_by_file_name(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "test_extra.jsonl", "test.jsonl"):
        jsonl(tmp_path / name, [{"text": name}])
    jsonl(tmp_path / "notes.jsonl", [{"text": "no split"}])
    splits = read_splits(tmp_path)
    assert list(splits) == ["train", "valid", "test"]
    assert splits["test"].rows == [{"text": "test.jsonl"}]
    assert "not read: notes.jsonl" in splits["train"].statement
    assert "not read: test_extra.jsonl" in splits["test"].statement
    assert "holds the splits" in refused(tmp_path)


def test_splits_by_folder_and_by_shard(tmp_path):
    for number in (1, 2):
        jsonl(tmp_path / f"h/data/train-0000{number}-of-00002.jsonl", [{"text": str(number)}])
    jsonl(tmp_path / "h/data/validation-00001-of-00001.jsonl", [{"text": "v"}])
    splits = read_splits(tmp_path / "h")
    assert [row["text"] for row in splits["train"]] == ["1", "2"] and len(splits["valid"]) == 1
    jsonl(tmp_path / "f/training/x.jsonl", [{"text": "t"}, {"text": "both"}])
    jsonl(tmp_path / "f/val/y.jsonl", [{"text": "both"}])
    splits = read_splits(tmp_path / "f")
    assert list(splits) == ["train", "valid"]
    assert "1 different row of valid also in train" in splits["valid"].statement


def test_split_without_targets(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel\nx\t1\n")
    write(tmp_path / "test.tsv", "index\tsentence\n0\tx\n")
    splits = read_splits(tmp_path)
    assert list(splits) == ["train"] and "test split is left out" in splits["train"].statement
    write(tmp_path / "test_labelled.tsv", "sentence\tlabel\ny\t1\n")
    splits = read_splits(tmp_path)
    assert splits["test"].rows == [{"text": "y", "label": "1"}]
    assert "test.tsv has no targets and was passed over" in splits["test"].statement
    alone = write(tmp_path / "alone/test.tsv", "index\tsentence\n0\tx\n")
    with pytest.raises(DataError, match="no column 'label'"):
        read_splits(alone.parent)
    (tmp_path / "train.tsv").write_text("index\tsentence\n0\tx\n")
    with pytest.raises(DataError, match="no column 'label'"):
        read_splits(tmp_path)


def test_splits_of_different_formats(tmp_path):
    jsonl(tmp_path / "train.jsonl", [PAIR])
    jsonl(tmp_path / "valid.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="train is of format prompt, valid of text"):
        read_splits(tmp_path)


@pytest.mark.parametrize(
    ("text", "rows", "kind"),
    [
        ('{"text": "x"}\n', [{"text": "x"}], "JSONL"),
        ('[{"text": "x"}]', [{"text": "x"}], "JSON"),
        ("text\tlabel\nx\t1\n", [{"text": "x", "label": "1"}], "TSV"),
        ("text,label\nx,1\n", [{"text": "x", "label": "1"}], "CSV"),
        ("Hello, world.\n", [{"text": "Hello, world."}], "TXT"),
    ],
)
def test_standard_input(monkeypatch, text, rows, kind):
    class Pipe:
        buffer = io.BytesIO(text.encode())

    monkeypatch.setattr(sys, "stdin", Pipe)
    dataset = read("-")
    assert dataset.rows == rows and f"read as {kind}" in dataset.statement
    assert dataset.origins[0][0] == "<standard input>"


def test_hub_id_offline_is_a_clear_error(tmp_path):
    pytest.importorskip("datasets")
    code = (
        "from lorica.data.read import read\nfrom lorica.errors import DataError\n"
        "try: read('some-org/no-such-set:config@main')\n"
        "except DataError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(source.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "some-org/no-such-set cannot be read in the local cache" in done.stdout, done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stdout


def test_hub_splits_become_tables():
    datasets = pytest.importorskip("datasets")
    from lorica.data.hub import tables_of

    part = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]})
    loaded = datasets.DatasetDict(train=part, validation=part, unsupervised=part)
    tables = tables_of(loaded, "org/name", 2)
    assert {split: len(table.rows) for split, table in tables.items()} == {"train": 2, "valid": 2}
    assert tables["train"].notes == ["splits not read: unsupervised"]
    with pytest.raises(DataError, match="has the splits other"):
        tables_of(datasets.DatasetDict(other=part), "org/name", None)


def test_missing_paths_name_the_nearest(tmp_path):
    jsonl(tmp_path / "train.jsonl", [PAIR])
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in refused(tmp_path / "trian.jsonl")
    assert "holds no data files" in refused(write(tmp_path / "x/a.bin", b"1").parent)
    assert "files ending in .bin are not read" in refused(tmp_path / "x/a.bin")


# what is no regular file


def test_odd_files_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is a FIFO" in refused(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "is a character device" in refused(tmp_path / "zero.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "a loop of symbolic links" in refused(tmp_path / "loop.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jsonl")[:100])
        assert "s.jsonl" in refused(tmp_path / "s.jsonl")


def test_links_out_of_a_folder_are_refused(tmp_path):
    target = jsonl(tmp_path / "real/a.jsonl", [{"text": "x"}])
    (tmp_path / "link.jsonl").symlink_to(target)
    assert len(read(tmp_path / "link.jsonl")) == 1  # named by the user
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(target)
    assert "leads out of the folder" in refused(folder)
    (tmp_path / "real/b.jsonl").symlink_to(target)
    assert len(read(tmp_path / "real")) == 2


@pytest.mark.parametrize(
    "magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh9", b"\xfd7zXZ\x00"]
)
def test_packed_files_are_refused(tmp_path, magic):
    assert "unpack it first" in refused(write(tmp_path / "a.jsonl", magic + b"0" * 50))


def test_sparse_and_endless_lines_are_not_read_whole(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(10 * 2**30)
    assert "a row that is too long" in refused(tmp_path / "a.jsonl")
    with open(tmp_path / "a.csv", "wb") as file:
        file.truncate(10 * 2**30)
    assert "larger than 2 GiB" in refused(tmp_path / "a.csv")


def test_ten_megabytes_in_a_row_are_allowed(tmp_path):
    text = "word " * (2 * 2**20)
    assert read(jsonl(tmp_path / "a.jsonl", [{"text": text}]))[0]["text"] == text
    many = [{"role": "user" if n % 2 == 0 else "assistant", "content": "x"} for n in range(100_000)]
    assert len(read(jsonl(tmp_path / "b.jsonl", [{"messages": many}]))[0]["messages"]) == 100_000


def test_change_while_reading_is_noticed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="changed while"), source.open_regular(path) as file:
        file.read()
        jsonl(path, [{"text": "x"}, {"text": "y"}])


# rows that cannot be used

BAD_LINES = [
    ('{"text": "x"', "the line is cut off"),
    ('{"text": "x",}', "remove the comma before the closing bracket"),
    ("{'text': 'x'}", "double quotes"),
    ('{"text": "x"} {"text": "y"}', "break the line between the objects"),
    ('[{"text": "x"}]', "not an object"),
    ('[{"text": "x"},', "name the file .json"),
    ('"text"', "not an object"),
    ("nonsense", "not valid JSON"),
    ('{"text": "x", "n": NaN}', "2 NaN near"),
    ('{"text": "x", "n": -Infinity}', "-Infinity"),
    ('{"text": "x", "n": 1e999}', "1e999"),
    ('{"text": "x", "text": "y"}', "a key stands twice"),
    ('{"a": {"b": 1, "b": 2}, "text": "x"}', "a key stands twice"),
    ('{"text": "x", "deep": ' + "[" * 10_000 + "]" * 10_000 + "}", "nested too deeply"),
    ('{"text": "x", "deep": ' + "[" * 150 + "]" * 150 + "}", "nested too deeply"),
    ('{"text": "x", "n": ' + "9" * 100_000 + "}", "a number that is too long"),
    ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ('{"text": "x", "\\udfff": 1}', "half of a surrogate pair"),
    ('{"text": "a\\u0000b"}', "a NUL character"),
    ('{"text": "a\x00b"}', "a NUL character"),
    ('{"text": ""}', "'text' is empty"),
    ('{"text": " \\n"}', "'text' is empty"),
    ('{"text": null}', "'text' is null instead of text"),
    ('{"text": 7}', "write it in quotes"),
    ('{"text": ["x"]}', "'text' is list instead of text"),
    ('{"Text": "x"}', "no column 'text'"),
    ('{"txt": "x", "other": 1}', "found: txt, other; 'txt' may be meant"),
    ("{}", "no column 'text'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_has_its_number_and_its_mend(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    text = refused(path)
    assert message in text and f"{path}:2" in text and "1 row cannot be used" in text
    dataset = read(path, max_bad_rows=1)
    assert dataset.rows == [{"text": "fine"}]
    assert "1 unusable row left out (first lines: 2)" in dataset.statement


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_element_of_an_array(tmp_path, line, message):
    path = write(tmp_path / "a.json", '[{"text": "fine"},\n' + line + "\n]")
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}:" in str(caught.value)


def test_all_kinds_at_once_with_counts_and_first_three(tmp_path):
    lines = ['{"text": "ok"}', *(["{"] * 5), *(['{"text": ""}'] * 4), '{"text": 1}']
    text = refused(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert "10 rows cannot be used" in text
    assert "not valid JSON (5x)" in text and "'text' is empty (4x)" in text
    assert "and 2 more" in text and "and 1 more" in text and "'text' is int" in text
    for line in (2, 3, 4, 7, 8, 9, 11):
        assert f"a.jsonl:{line}" in text
    assert "a.jsonl:5" not in text and "a.jsonl:10" not in text
    assert "max_bad_rows=10" in text
    assert "max_bad_rows is -1" in refused(tmp_path / "a.jsonl", max_bad_rows=-1)


def test_the_list_of_an_object_is_the_one_at_its_top(tmp_path):
    inner = '{"meta": {"data": [{"text": "n"}], "n": [1, "]"]}, "x" : 1 , "data": [{"text": "y"}]}'
    dataset = read(write(tmp_path / "a.json", inner))
    assert dataset.rows == [{"text": "y"}] and 'rows of "data"' in dataset.statement
    escaped = '{"d\\u0061ta": [{"text": "y"}]}'
    assert read(write(tmp_path / "b.json", escaped)).rows == [{"text": "y"}]


def test_invalid_utf8_names_the_byte(tmp_path):
    bad = '{"text": "caf\u00e9"}\n'.encode("latin-1")
    text = refused(write(tmp_path / "a.jsonl", b'{"text": "x"}\n' + bad))
    assert "a.jsonl:2" in text and "byte 0xe9 at byte 14 of the line" in text and "iconv" in text
    text = refused(write(tmp_path / "a.csv", b"text\nx\ncaf\xe9\n"))
    assert "a.csv:3 is not UTF-8: byte 0xe9 at byte 10" in text
    assert "is not UTF-16" in refused(write(tmp_path / "b.csv", b"\xff\xfea\x00b"))


def test_json_positions(tmp_path):
    path = write(
        tmp_path / "a.json", '[\n  {\n    "text": "x"\n  },\n  {"text": ""},\n  {"text" 1}\n]'
    )
    text = refused(path)
    assert f"{path}:5" in text and f"{path}:6:11 Expecting ':' delimiter" in text
    assert "a comma stands before" in refused(write(tmp_path / "b.json", '[{"text": "x"},]'))
    assert "holds no list of rows; found: rows_, x" in refused(
        write(tmp_path / "c.json", '{"rows_": [], "x": 1}')
    )
    assert "holds no rows" in refused(write(tmp_path / "d.json", "[]"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b\nc\n", ":3 1 instead of 2"),
        ("prompt,completion\na,b,c\n", ":2 3 instead of 2"),
        ('prompt,completion\na,b\n"c,d\ne,f\n', ":3 unexpected end of data"),
        ('prompt,completion\n"a" x,b\n', "a field that cannot be read"),
        ("prompt,prompt\na,b\n", "names a column twice: prompt"),
        ("prompt,completion\na,b\nprompt,completion\n", ":3 near"),
        ("prompt,completion\na,\x00\n", ":2 holds a NUL"),
        ("prompt,completion\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    assert message in refused(write(tmp_path / "a.csv", text))


def test_control_characters_are_kept_and_counted(tmp_path):
    rows = [{"text": "bell \x07"}, {"text": "tab\t and\nline"}]
    dataset = read(jsonl(tmp_path / "a.jsonl", rows))
    assert dataset.rows == rows and "1 row with control characters" in dataset.statement
    assert "control characters" in read(write(tmp_path / "a.csv", "text\nbell \x07\n")).statement


def test_repeated_rows_are_counted(tmp_path):
    dataset = read(jsonl(tmp_path / "a.jsonl", [PAIR, PAIR, {**PAIR, "id": 3}]))
    assert len(dataset) == 3 and "2 rows repeating an earlier one" in dataset.statement


def test_excerpts_cannot_disturb_a_terminal(tmp_path):
    text = refused(write(tmp_path / "a.jsonl", '{"text": "\x1b[2J'))
    assert "\x1b" not in text and "\\u001b" in text


def test_group_references():
    rows = [
        {"prompt": "p", "completion": "1", "id": 7},
        {"prompt": "q", "completion": "2"},
        {"prompt": "p", "completion": "3", "references": ["1", "4"]},
    ]
    grouped = group_references(from_rows(rows))
    assert grouped.rows == [
        {"prompt": "p", "completion": "1", "id": 7, "references": ["1", "3", "4"]},
        {"prompt": "q", "completion": "2", "references": ["2"]},
    ]
    assert grouped.origins == [("rows", 1), ("rows", 2)]
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    other = [chat[0], {"role": "assistant", "content": "b"}]
    grouped = group_references(from_rows([{"messages": chat}, {"messages": other}]))
    assert grouped[0]["references"] == ["a", "b"] and len(grouped) == 1
    with pytest.raises(DataError, match="have no references"):
        group_references(from_rows([{"text": "x"}]))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_never_raise_anything_else(tmp_path, data):
    ending = data.draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]))
    seeds = {
        ".jsonl": b'{"text": "a\\u00e9", "label": 1}\n{"text": "b", "label": [2, {"x": null}]}\n',
        ".json": b'{"data": [{"text": "a", "label": 1},\n {"text": "b", "label": 0}]}',
        ".csv": b'text,label\n"a ""b""",1\nc,0\n',
        ".tsv": b'text\tlabel\n"a"\t1\nc\t0\n',
        ".txt": b"One.\n\nTwo.\n<|endoftext|>\nThree.\n",
    }
    raw = bytearray(seeds[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        length = data.draw(st.integers(0, 3))
        raw[at : at + length] = data.draw(st.binary(max_size=3))
    path = tmp_path / f"a{ending}"
    path.write_bytes(bytes(raw))
    try:
        dataset = read(path)
    except LoricaError as error:
        assert error.what and error.exit_code == 2
    else:
        assert len(dataset) > 0 and len(dataset.digest) == 64

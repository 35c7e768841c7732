"""The public text sets beside the repository: real files with all their habits."""

import os
from pathlib import Path

import pytest

from lorica.data.read import group_references, read, read_splits
from lorica.errors import DataError

SHARED = Path(os.environ.get("LORICA_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")


def test_e2e():
    splits = read_splits(SHARED / "e2e_nlg")
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 42_061,
        "valid": 4_672,
        "test": 4_693,
    }
    assert splits["train"][0]["prompt"].startswith("name[The Vaults]")
    grouped = group_references(splits["test"])
    assert len(grouped) == 630 and sum(len(row["references"]) for row in grouped) <= 4_693
    assert max(len(row["references"]) for row in grouped) > 5
    assert len(group_references(splits["valid"])) == 547


@pytest.mark.parametrize(
    ("name", "train", "valid", "columns"),
    [
        ("SST-2", 67_349, 872, None),
        ("MRPC", 3_667, 408, None),
        ("RTE", 2_490, 277, None),
        ("WNLI", 635, 71, None),
        ("CoLA", 8_551, 1_043, {"text": "3", "label": "1"}),
        ("STS-B", 5_749, 1_500, {"text": "sentence1", "text_pair": "sentence2", "label": "score"}),
    ],
)
def test_glue(name, train, valid, columns):
    splits = read_splits(SHARED / "glue" / name, columns=columns)
    assert {name: len(part) for name, part in splits.items()} == {"train": train, "valid": valid}
    assert splits["train"].format == "classification"
    assert "test split is left out" in splits["train"].statement
    pairs = name not in ("SST-2", "CoLA")
    assert all(("text_pair" in row) == pairs for row in splits["valid"])


def test_cola_without_columns_says_how_to_map():
    with pytest.raises(DataError, match='"text": "3", "label": "1"'):
        read(SHARED / "glue/CoLA/train.tsv")


@pytest.mark.parametrize(
    ("name", "rows", "format"),
    [
        ("gsm8k/train.jsonl", 7_473, "prompt"),
        ("gsm8k/test_socratic.jsonl", 1_319, "prompt"),
        ("alpaca_en/alpaca_data_1k.json", 1_000, "prompt"),
        ("alpaca_en/alpaca_small.json", 2_000, "prompt"),
        ("alpaca_en/alpaca_en_demo.json", 999, "prompt"),
        ("catgirl_zh/cat_0.6B.json", 576, "prompt"),
        ("catgirl_zh/cat_1.7B.json", 270, "prompt"),
        ("text_raw/c4_demo.jsonl", 300, "text"),
        ("tinystories_sample/tinystories_2MiB.txt", 2_317, "text"),
        ("tinystories_sample/tinystories_sample.txt", 5, "text"),
    ],
)
def test_single_files(name, rows, format):
    dataset = read(SHARED / name)
    assert (len(dataset), dataset.format) == (rows, format)


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "names.txt", "books/alice_11.txt"])
def test_running_text_loses_no_word(name):
    path = SHARED / "text_raw" / name
    words = path.read_bytes().decode("utf-8-sig").split()
    assert " ".join(row["text"] for row in read(path)).split() == words


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpaca_en/seed_tasks.jsonl", "no column 'output'"),
        ("catgirl_zh/NekoBench.json", "no column 'answer'"),
        ("pii_presidio/generated_small.json", "columns found: full_text, masked, spans"),
        ("e2e_nlg/testset.csv", "no column 'ref' beside MR"),
        ("e2e_nlg/e2e-dataset.zip", "files ending in .zip"),
    ],
)
def test_sets_without_targets_say_what_is_missing(name, message):
    with pytest.raises(DataError, match="(?s)" + message):
        read(SHARED / name)


def test_mapped_columns():
    path = SHARED / "pii_presidio/generated_small.json"
    dataset = read(path, columns={"prompt": "full_text", "completion": "masked"})
    assert len(dataset) == 100 and "spans" in dataset[0]

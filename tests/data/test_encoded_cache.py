"""Encoded records from the cache are what a fresh encoding gives, and nothing damaged is read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lorica.base.locate import EMBEDDED
from lorica.base.tokenizer import load_tokenizer
from lorica.data import encoded_cache
from lorica.data.encoded_cache import EncodedCache, user_folder
from lorica.data.read import from_rows
from lorica.tasks import CausalLM, TextClassification


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(encoded_cache, "FEWEST_RECORDS", 1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.fixture
def cache(tmp_path):
    return EncodedCache(tmp_path / "encoded")


PAIRS = from_rows(
    [{"prompt": f"number {n}", "completion": f" is {'very ' * n}large"} for n in range(40)]
)
TEXTS = from_rows([{"text": "a long story " * n} for n in range(1, 30)])
CLASSES = from_rows(
    [
        {"text": f"so {n}", "label": "ab"[n % 2], "text_pair": "and " * (1 + n % 5)}
        for n in range(40)
    ]
)
CASES = {
    "prompts": (PAIRS, lambda t: CausalLM.of(t, max_length=16)),
    "texts in windows": (TEXTS, lambda t: CausalLM.of(t, max_length=8)),
    "classes": (CLASSES, lambda t: TextClassification(t, ("a", "b"), 6)),
}


def through(cache: EncodedCache, task, records):
    """The records through the cache, and whether they were encoded anew."""
    made = []

    def make():
        made.append(True)
        return task.encode(records)

    found, told = cache.encoded(records, task.encoding(), make)
    return found, told, bool(made)


def entries(cache: EncodedCache) -> list[Path]:
    return sorted(cache.folder.glob("*.encoded"))


@pytest.mark.parametrize("case", CASES)
def test_a_cached_encoding_is_the_fresh_one_to_the_last_list(cache, tokenizer, case):
    records, of = CASES[case]
    fresh = of(tokenizer).encode(records)
    assert fresh.notes, "the case shall have notes to keep"
    first, _, made = through(cache, of(tokenizer), records)
    again, told, made_again = through(cache, of(tokenizer), records)
    assert made and not made_again and "were encoded earlier" in told[0]
    assert repr(again) == repr(first) == repr(fresh)
    assert again.examples == fresh.examples and again.notes == fresh.notes


@pytest.mark.parametrize(
    "other",
    [
        lambda t, r: (CausalLM.of(t, max_length=17), r),
        lambda t, r: (CausalLM.of(t, max_length=16, train_on="all"), r),
        lambda t, r: (CausalLM.of(t, max_length=16, separator="\n"), r),
        lambda t, r: (CausalLM.of(t, max_length=16, add_bos=False), r),
        lambda t, r: (CausalLM.of(t, max_length=16), r.subset(range(39), "fewer")),
        lambda t, r: (CausalLM.of(t, max_length=16), replace(r, origins=[("b", 1)] * len(r))),
    ],
    ids=["max_length", "train_on", "separator", "add_bos", "records", "origins"],
)
def test_whatever_decides_about_the_numbers_decides_about_the_entry(cache, tokenizer, other):
    through(cache, CausalLM.of(tokenizer, max_length=16), PAIRS)
    task, records = other(tokenizer, PAIRS)
    found, told, made = through(cache, task, records)
    assert made and not told
    assert found.examples == task.encode(records).examples
    assert len(entries(cache)) == 2


def test_another_tokenizer_is_another_entry(cache, tokenizer):
    through(cache, CausalLM.of(tokenizer), PAIRS)
    other = load_tokenizer(EMBEDDED)
    other.add_tokens(["number"])
    assert through(cache, CausalLM.of(other), PAIRS)[2]
    assert not through(cache, CausalLM.of(load_tokenizer(EMBEDDED)), PAIRS)[2]


def test_other_code_is_another_entry(cache, tokenizer, tmp_path):
    task = CausalLM.of(tokenizer)
    encoding = task.encoding()
    cache.encoded(PAIRS, encoding, lambda: task.encode(PAIRS))
    changed = tmp_path / "encode.py"
    changed.write_bytes(Path(encoding.sources[0]).read_bytes() + b"\n# changed")
    other = replace(encoding, sources=[changed, *encoding.sources[1:]])
    made = []
    cache.encoded(PAIRS, other, lambda: made.append(1) or task.encode(PAIRS))
    assert made


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_entry_is_encoded_anew_and_said(cache, tokenizer, damage):
    task = CausalLM.of(tokenizer)
    fresh, _, _ = through(cache, task, PAIRS)
    (entry,) = entries(cache)
    raw = bytearray(entry.read_bytes())
    raw[len(raw) // 2] ^= 1
    entry.write_bytes({"cut": bytes(raw[:-40]), "flipped": bytes(raw), "emptied": b""}[damage])
    found, told, made = through(cache, task, PAIRS)
    assert made and "cannot be used" in told[0] and found.examples == fresh.examples
    assert not through(cache, task, PAIRS)[2], "the entry is whole again"


def test_a_stop_in_the_middle_leaves_no_entry(cache, tokenizer, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stopped)
        through(cache, CausalLM.of(tokenizer), PAIRS)
    assert list(cache.folder.iterdir()) == []
    assert through(cache, CausalLM.of(tokenizer), PAIRS)[2]


def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path, tokenizer):
    (tmp_path / "file").write_text("in the way")
    cache = EncodedCache(tmp_path / "file" / "encoded")
    found, told, made = through(cache, CausalLM.of(tokenizer), PAIRS)
    assert made and len(found) == len(PAIRS) and any("cannot be kept" in line for line in told)


def test_the_entry_that_was_not_used_for_longest_makes_room(cache, tokenizer):
    sizes = [8, 9, 10, 11]
    for age, length in enumerate(sizes):
        through(cache, CausalLM.of(tokenizer, max_length=length), PAIRS)
        for entry in entries(cache):
            if entry.stat().st_mtime > 1e6:
                os.utime(entry, (1000 + age, 1000 + age))
    through(cache, CausalLM.of(tokenizer, max_length=8), PAIRS)  # used: now the youngest
    whole = sum(entry.stat().st_size for entry in entries(cache))
    small = replace(cache, most_bytes=whole)
    through(small, CausalLM.of(tokenizer, max_length=12), PAIRS)
    kept = [not through(small, CausalLM.of(tokenizer, max_length=n), PAIRS)[2] for n in (8, 11)]
    assert kept == [True, True]
    assert sum(entry.stat().st_size for entry in entries(cache)) <= whole


def test_an_entry_is_for_its_owner_only(cache, tokenizer):
    through(cache, CausalLM.of(tokenizer), PAIRS)
    (entry,) = entries(cache)
    assert entry.stat().st_mode & 0o077 == 0


def test_the_folder_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/else")
    assert user_folder() == Path("/somewhere/else/lorica")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder() == Path.home() / ".cache" / "lorica"

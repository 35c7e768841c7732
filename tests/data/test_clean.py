"""Cleaning says what it did, does what it said, and leaves its input alone."""

import copy
import json

import pytest

from data.test_screen import C, P
from lorica.data import duplicates
from lorica.data.clean import clean
from lorica.data.dataset import digest_of
from lorica.data.duplicates import NearIndex, near_parts, repeats
from lorica.data.read import from_rows
from lorica.data.texts import normalised
from lorica.errors import MissingPackage


def edited(text: str) -> str:
    return text.replace("was there", "is there")


def test_steps_count_what_they_did():
    near = {key: edited(value) for key, value in P[5].items()}
    mail = {"prompt": "mail a@b.example.org\r\nnow", "completion": "it was\u200b done"}
    rows = [*P, dict(P[3]), near, mail, P[7]]
    data = from_rows(rows)
    before = copy.deepcopy(data.rows)
    held = from_rows([{"prompt": P[9]["prompt"], "completion": "x"}])
    found = clean(data, against=[held], near=True, redact=True)
    assert data.rows == before
    assert {s.name: (s.removed, s.changed) for s in found.steps} == {
        "normalise": (0, 1),
        "redact": (0, 1),
        "exact": (2, 0),
        "near": (1, 0),
        "leak": (1, 0),
    }
    assert len(found.dataset) == len(rows) - 4
    assert found.dataset.rows[-1] == {"prompt": "mail [EMAIL]\nnow", "completion": "it was done"}
    assert found.dataset.digest == digest_of(found.dataset.rows)
    assert P[9] not in found.dataset.rows and P[3] in found.dataset.rows
    assert len(found.dataset.origins) == len(found.dataset)


def test_clean_rows_stay_as_they_are():
    data = from_rows(P)
    found = clean(data, near=True, redact=True)
    assert found.dataset is data and all(s.removed == s.changed == 0 for s in found.steps)


def test_cleaning_twice_changes_nothing_more():
    rows = [*P, dict(P[3]), {"prompt": "a\r\nb", "completion": "mail a@b.example.org"}]
    once = clean(from_rows(rows), near=True, redact=True).dataset
    again = clean(from_rows(once.rows), near=True, redact=True)
    assert again.dataset.rows == once.rows


def test_labels_and_roles_are_not_redacted():
    rows = [{**C[0], "label": "a@b.example.org"}, *C[1:]]
    assert clean(from_rows(rows), redact=True).dataset.rows[0]["label"] == "a@b.example.org"
    turns = [
        {"role": "user", "content": "a@b.example.org"},
        {"role": "assistant", "content": "yes"},
    ]
    (row,) = clean(from_rows([{"messages": turns}]), redact=True).dataset.rows
    assert json.dumps(row["messages"]).count("[EMAIL]") == 1
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("keep", range(0, 60, 7))
def test_every_near_twin_of_a_sentence_is_found(keep):
    parts = [near_parts(row) for row in P]
    index = NearIndex()
    assert set(index.near(parts)) == {None}
    twin = tuple(normalised(edited(text)) for text in (P[keep]["prompt"], P[keep]["completion"]))
    assert list(index.near([twin], add=False)) == [keep]


def test_one_edit_is_found_nearly_always():
    """95 of 100 sentences with one letter changed."""
    index = NearIndex()
    texts = [row[key].strip() for row in P[:50] for key in ("prompt", "completion")]
    list(index.near([(text,) for text in texts]))
    changed = [f"{t[: len(t) // 2]}#{t[len(t) // 2 + 1 :]}" for t in texts]
    found = list(index.near([(text,) for text in changed], add=False))
    assert sum(a == b for a, b in zip(found, range(len(texts)), strict=True)) >= 95


def test_repeats_point_at_the_first():
    assert repeats(["a", "b", "a", "a", "b"]) == {2: 0, 3: 0, 4: 1}


def test_without_the_package_the_command_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingPackage, match="datasketch") as caught:
        duplicates.NearIndex()
    assert "lorica[clean]" in str(caught.value)

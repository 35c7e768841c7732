"""The page of a search: one file that needs nothing, whatever stands in the names."""

import json
import re

import pytest

from lorica.errors import DataError
from lorica.records.folder import json_text
from lorica.records.search_page import suggested_text, table_of, write_search_page
from search.findings import findings


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "search.json").write_bytes(json_text(findings()))
    (tmp_path / "run.yaml").write_text("version: 1\nr: 16  # search\n")
    return tmp_path


def test_the_page_has_answer_figures_and_settings_and_needs_no_network(folder):
    page = write_search_page(folder).read_text()
    found = findings()
    assert found["sentence"][1:] in page and page.count("<svg") == 5
    assert "r: 16  # search" in page and "c008 (rank 4096, lr 0.001) could not be trained" in page
    assert not re.search(r"https?://|<script|@import", page)
    assert len(set(re.findall(r'\bid="([^"]+)"', page))) == len(re.findall(r'\bid="', page))
    assert write_search_page(folder, output=folder / "two.html").read_text() == page


def test_the_table_is_sorted_by_what_became_of_them_and_by_loss():
    rows = table_of(findings())[1:]
    assert [row[0] for row in rows] == [
        *("c007", "c005", "c003", "c001", "c006", "c004", "c002", "c000", "c008"),
    ]
    assert rows[0][-1] == "the best" and rows[1][-1] == "chosen"
    assert rows[2][-1].startswith("ended early: not among the best 50%")


def test_suggested_ranks_are_yaml_of_settings():
    from lorica.config.text import parse_yaml

    text = suggested_text(findings())
    assert text.startswith("r: 2\nrank_pattern:\n  model.layers.1.self_attn.q_proj: 3")
    values = parse_yaml(text).values
    assert values["r"] == 2 and len(values["rank_pattern"]) == 25


def test_what_names_hold_is_shown_and_not_run(folder):
    found = findings()
    found["candidates"][0]["words"] = "<script>alert(1)</script> \u202e"
    (folder / "search.json").write_text(json.dumps(found))
    page = write_search_page(folder).read_text()
    assert "<script>" not in page and "\u202e" not in page and "&lt;script&gt;" in page


def test_without_spectrum_or_importance_there_is_a_page(folder):
    found = {**findings(), "spectrum": None, "importance": {"step": None, "settings": {}}}
    (folder / "search.json").write_text(json.dumps(found))
    assert write_search_page(folder).read_text().count("<svg") == 2


def test_a_folder_without_an_answer_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no answer of a search"):
        write_search_page(tmp_path)

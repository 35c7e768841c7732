"""What trains, what is held out and what is scored."""

import json

import pytest

from lorica.cli.material import Material, check_format, class_names, drawn, for_scoring, gather
from lorica.config import RunConfig
from lorica.data.read import from_rows
from lorica.errors import DataError


def rows(number, answers=1):
    return [{"prompt": f"p{i // answers}", "completion": f"c{i}"} for i in range(number)]


def material(tmp_path, records, **settings) -> Material:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in records))
    return gather(RunConfig(model="m", data=str(file), **settings), seed=0)


def test_no_input_on_both_sides(tmp_path):
    found = material(tmp_path, rows(90, answers=3), eval_size=10)
    trained = {row["prompt"] for row in found.train.rows}
    held = {row["prompt"] for row in found.held_out}
    assert not trained & held and len(found.held_out) in (10, 11, 12)
    assert len(found.test) == len(held), "references of an input are together"
    assert all(len(row["references"]) == 3 for row in found.test)


def test_the_scored_are_drawn_not_the_first(tmp_path):
    records = [{"text": f"t{i}", "label": "a" if i < 50 else "b"} for i in range(100)]
    found = material(tmp_path, records, eval_size=60, eval_records=20)
    assert {row["label"] for row in found.test} == {"a", "b"}
    assert len(found.test) == len(found.held_out) == 20
    assert any("drawn with seed 0" in line for line in found.statements)
    again = material(tmp_path, records, eval_size=60, eval_records=20)
    assert again.test == found.test


def test_drawn_keeps_the_order_and_all_where_there_are_few():
    records = from_rows(rows(10))
    assert drawn(records, None, 0) == (records, "") == drawn(records, 10, 0)
    chosen, why = drawn(records, 4, 0)
    places = [int(row["prompt"][1:]) for row in chosen.rows]
    assert places == sorted(places) and why == "4 of 10 records, drawn with seed 0"


def test_scoring_groups_references():
    chosen, why = for_scoring(from_rows(rows(12, answers=3)), 2, 0)
    assert len(chosen) == 2 and "2 of 4 inputs" in why and "12 references" in why
    assert for_scoring(from_rows(rows(3)), None, 0)[1] == ""


def test_all_of_one_input_cannot_be_held_out(tmp_path):
    with pytest.raises(DataError, match="same input"):
        material(tmp_path, rows(9, answers=9), eval_size=2)


def test_formats_and_tasks():
    with pytest.raises(DataError) as caught:
        check_format(from_rows(rows(2)), "text-classification")
    assert "set --task causal-lm" in str(caught.value)


def test_an_encoder_continues_no_text(tmp_path):
    """Said before its tokenizer is asked for an end token, which it may lack as well."""
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "bert"}))
    found = material(tmp_path, rows(20))
    with pytest.raises(DataError, match="is an encoder") as caught:
        found.task("auto", str(file.parent))
    assert "text and label" in str(caught.value)
    for other in (
        {"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": True},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    ):
        file.write_text(json.dumps(other))
        assert found.task("auto", str(file.parent)) == "causal-lm"


def test_class_names():
    named = from_rows([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    numbered = from_rows([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    assert class_names(named) == ("x", "y") and class_names(numbered) == ()
    assert class_names(from_rows(rows(2))) == ()


def test_the_embedded_data():
    found = gather(RunConfig(model="embedded", data="embedded", eval_records=5), seed=0)
    assert len(found.test) == 5 and found.generates
    assert found.metrics("causal-lm")[0] == "slot_accuracy"

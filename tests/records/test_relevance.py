"""relevance.json and its section of the report."""

import json

from lorica.records.relevance import section
from lorica.records.report import write_report

PLACES = [
    {
        "path": f"model.layers.{layer}.{kind}",
        "layer": layer,
        "kind": kind.rpartition(".")[2],
        "value": 0.1 + layer * place,
        "chosen": 10 * layer + place,
        "size": 100,
    }
    for layer in range(3)
    for place, kind in enumerate(["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
]
RELEVANCE = {
    "measure": "fisher",
    "unit": "entries",
    "num_records": 12,
    "notes": ["two layers get no rank"],
    "places": PLACES,
}


def test_the_section_says_what_was_given_and_where():
    found = section(RELEVANCE)
    assert found is not None
    assert found["lines"][0].startswith("99 of 900 entries were given by fisher, from 12 records")
    assert found["lines"][1] == "Two layers get no rank."
    (figure,) = found["figures"]
    for text in ("q_proj", "o_proj", "up_proj", "relevance (fisher)", "entries given", "layer"):
        assert text in figure
    dark = figure.count("var(--series-0)")
    assert dark == 2 * 9 - 1 and "opacity: 0.7" in figure, "one was given nothing"
    assert found["rows"][0][0] == "model.layers.2.mlp.up_proj"


def test_heads_have_a_figure_of_their_own():
    heads = [{**place, "heads": [1.0, 2.0, 0.5]} for place in PLACES if "attn" in place["path"]]
    found = section({**RELEVANCE, "places": heads})
    assert found is not None and len(found["figures"]) == 2
    assert "q_proj, layer by head" in found["figures"][1]


def test_nothing_is_shown_of_nothing_and_of_rubbish():
    assert section({}) is None
    assert section({"places": "none"}) is None
    broken = [{"path": "<b>", "layer": None, "kind": "<b>", "value": float("nan")}, 3]
    assert section({"places": broken}) is None


def test_the_report_has_it_and_is_whole_without_it(make_run):
    path = make_run()
    assert "Where it matters" not in write_report(path).read_text(encoding="utf-8")
    hostile = [{**PLACES[0], "kind": "<script>", "path": "</table><script>"}]
    (path / "relevance.json").write_text(json.dumps({**RELEVANCE, "places": hostile}))
    text = write_report(path).read_text(encoding="utf-8")
    assert "Where it matters" in text and "<script>" not in text
    assert write_report(path).read_text(encoding="utf-8") == text

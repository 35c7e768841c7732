"""The model card: front matter as the hub reads it, and text that stays text."""

import ast
import re

import pytest
import yaml

from lorica.records.card import lorica_snippet, model_card, peft_snippet, write_card
from records.run_rows import SCORES, manifest_for


def parts(card: str) -> tuple[dict, str]:
    match = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def manifest(**more) -> dict:
    base = {
        "name": "HuggingFaceTB/SmolLM2-135M",
        "num_parameters": 134_515_008,
        "digest": "sha256:aa",
    }
    return manifest_for("e2e") | {"base": base, "scores": SCORES} | more


def test_front_matter_of_a_hub_base():
    front, body = parts(model_card(manifest(license="apache-2.0"), adapter="e2e"))
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert front["license"] == "apache-2.0"
    assert front["tags"] == [
        "base_model:adapter:HuggingFaceTB/SmolLM2-135M",
        "lora",
        "lorica",
        "transformers",
    ]
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert metrics[0] == {"type": "chrf", "name": "chrF", "value": 45.62}
    assert "| chrF | 12.3 | 45.6 | +33.3 | 31.0 to 35.5 | 630 |" in body
    assert "Better than the base: chrF 12.3 → 45.6" in body
    assert "| `r` | 8 |" in body and "| `seed` | 0 |" in body
    assert "sha256:8d5f" in body and "24.6 K trained parameters" in body


@pytest.mark.parametrize(
    "name", ["/home/ada/models/tiny", "C:\\Users\\ada\\tiny", "../tiny", "models/tiny"]
)
def test_local_base_is_no_id_and_no_path_leaks(name):
    card = model_card(manifest(base={"name": name}), adapter="e2e")
    front, body = parts(card)
    assert "base_model" not in front
    assert "ada/" not in card and "ada\\" not in card and "path/to/tiny" in body
    assert not [tag for tag in front["tags"] if tag.startswith("base_model")]


def test_the_snippets_for_the_embedded_base_run():
    card = model_card(manifest(base={"name": "embedded"}, task="causal-lm"), adapter="e2e")
    _, body = parts(card)
    assert "path/to/embedded" not in body
    blocks = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        made: dict = {}
        lines = block.splitlines()
        head = [line for line in lines if "import lorica" in line or "load_model" in line]
        exec("\n".join(head), made)  # our own text
        assert made.get("base", made.get("model")).config.model_type == "llama"


def test_without_scores_nothing_is_claimed():
    front, body = parts(model_card(manifest_for("e2e"), adapter="e2e"))
    assert "model-index" not in front
    assert "better" not in body


def test_scores_of_the_adapter_win():
    own = {"accuracy": {"base": 0.5, "tuned": 0.75}}
    card = model_card(manifest(adapters={"e2e": {"scores": own}}), adapter="e2e")
    assert "accuracy" in card and "chrF" not in card


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("causal-lm", "AutoModelForCausalLM"),
        ("text-classification", "AutoModelForSequenceClassification"),
        ("seq2seq", "AutoModelForSeq2SeqLM"),
        ("something", "AutoModel"),
    ],
)
def test_snippets_are_python(task, auto):
    values = manifest(task=task, num_labels=3)
    text = peft_snippet(values, 'runs/a "b"\\c/🙂')
    tree = ast.parse(text)
    assert 'runs/a "b"\\c/🙂' in {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert f"{auto}.from_pretrained(" in text
    assert ("num_labels=3" in text) == (task == "text-classification")
    assert ast.parse(lorica_snippet(values, "runs/x", 'na"me'))


@pytest.mark.parametrize(
    ("config", "loads"), [('{"peft_type": "LORA"}', True), ('{"format": "lorica"}', False)]
)
def test_peft_is_named_only_where_it_loads_the_files(tmp_path, config, loads):
    (tmp_path / "adapter_config.json").write_text(config)
    front, body = parts(write_card(tmp_path, manifest(), adapter="e2e").read_text("utf-8"))
    assert front["library_name"] == ("peft" if loads else "lorica")
    assert ("PeftModel" in body) is loads and "lorica.load_adapter" in body


def test_hostile_words_stay_words(tmp_path):
    nasty = "a\n---\nlicense: evil\n```\n| x | <script>alert(1)</script> [l](http://x) \ud800"
    values = manifest(
        base={"name": nasty, "digest": nasty},
        versions={nasty: nasty},
        scores={nasty: SCORES["chrf"]},
        method={"kind": nasty, nasty: nasty},
        task=nasty,
        license=nasty,
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    path = write_card(tmp_path, values, adapter=nasty)
    front, body = parts(path.read_text("utf-8"))
    assert front["license"].startswith("a\n---\nlicense: evil")
    prose = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", prose))  # escaped signs, then code spans
    assert "<script>" not in prose and "](http" not in prose
    assert len(re.findall(r"^```", body, re.MULTILINE)) == 4
    assert "\nlicense: evil" not in body
    for line in body.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")

"""`inspect`, `config` and the help pages."""

import json
from pathlib import Path

import pytest

from lorica.cli import COMMANDS
from lorica.config import known_settings, load_yaml
from lorica.methods import METHODS


@pytest.mark.parametrize(
    ("base", "kind"),
    [("llama", "causal-lm"), ("bert", "text-classification"), ("t5", "seq2seq")],
)
def test_inspect_knows_what_a_base_is_for(lorica, stock, base, kind):
    done = lorica("inspect", stock / base)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].endswith(f"loaded for {kind}")
    assert "all-linear" in done.out and "auto: auto" not in done.out


def test_inspect_speaks_json_and_fits_80_columns(lorica, stock):
    found = lorica("inspect", stock / "llama", "--json", "--r", "4").rows[0]
    assert found["rank"] == 4 and found["model_class"] == "LlamaForCausalLM"
    page = lorica("inspect", stock / "llama").out
    assert max(map(len, page.splitlines())) <= 80


def test_inspect_of_nothing(lorica, stock):
    done = lorica("inspect", "./nowhere")
    assert done.code == 2 and "./nowhere" in done.err
    assert lorica("inspect", stock).code == 2
    wrong = lorica("inspect", stock / "llama", "--task", "seq2sqe")
    assert wrong.code == 2 and "did you mean seq2seq?" in wrong.err


def test_config_is_a_settings_file(lorica):
    done = lorica("config")
    assert done.code == 0
    for setting in known_settings(METHODS).values():
        assert f"{setting.key}: " in done.out
    Path("run.yaml").write_text(done.out, encoding="utf-8")
    assert set(load_yaml("run.yaml").values) == {"version", "model", "data", "output_dir"}
    resolved = lorica("train", "run.yaml", "--dry-run")
    assert resolved.code == 0 and "# run.yaml:" in resolved.out
    everything = done.out.replace("\n# ", "\n")
    kept = [
        line
        for line in everything.splitlines()
        if ": " in line and line.split(":")[0].isidentifier()
    ]
    Path("all.yaml").write_text("\n".join(line for line in kept if "  " not in line))
    assert "learning_rate: 0.0002" in everything


def test_inspect_knows_what_was_trained(lorica, finished_run, stock):
    run, adapter, base = (
        lorica("inspect", path).out.splitlines()
        for path in (finished_run, finished_run / "adapter", stock / "llama")
    )
    assert run[0] == f"run {finished_run}: finished"
    assert run[1].startswith("adapter default: lora, ") and "14 places" in run[1]
    assert run[-len(base) :] == base == adapter[-len(base) :]
    assert adapter[0].startswith("adapter adapter: lora, ")
    number = run[1].split(", ")[1]
    assert number in adapter[0], "as many parameters as its file has"
    found = lorica("inspect", finished_run, "--json").rows[0]["trained"]
    assert found["status"] == "finished" and found["adapters"]["default"]["kind"] == "lora"


def test_config_schema(lorica):
    schema = json.loads(lorica("config", "--schema").out)
    assert schema["additionalProperties"] is False and "learning_rate" in schema["properties"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_pages_fit_80_columns(lorica, command):
    words = [command] if command else []
    page = lorica(*words, "--help")
    assert page.code == 0 and page.err == ""
    assert lorica(*words, "-h").out == page.out
    assert page.out.startswith("Usage: lorica") and max(map(len, page.out.splitlines())) <= 80
    assert all(line == line.rstrip() for line in page.out.splitlines())


def test_help_of_train_names_every_setting(lorica):
    page = lorica("train", "--help").out
    for setting in known_settings(METHODS).values():
        assert f"  {setting.flag}" in page


def test_the_command_itself(lorica):
    assert lorica().out == lorica("--help").out
    assert lorica("--version").out.startswith("lorica ")
    wrong = lorica("trian")
    assert wrong.code == 2 and "did you mean train?" in wrong.err
    assert lorica("eval").code == 2
    assert lorica("eval", "x", "--data").code == 2
    assert lorica("eval", "x", "--data", "y", "--limit", "0").code == 2


def test_inspect_tells_what_quantizing_saves(lorica, stock):
    memory = lorica("inspect", stock / "llama", "--json").rows[0]["memory"]
    assert list(memory) == ["float32", "bfloat16", "nf4", "fp4", "int8"]
    assert memory["float32"] == 2 * memory["bfloat16"] > 2 * memory["int8"] > 2 * memory["nf4"]
    assert "memory of the weights: float32" in lorica("inspect", stock / "llama").out

"""A secret that the process or the records hold is in no file of a run and in nothing it says.

The environment holds fake keys, and so do some records: the first, which is shown, held-out ones,
whose answers are shown, and broken ones, which errors are about.
"""

import json
import platform
from pathlib import Path

import pytest

from cli.conftest import pairs, write_rows

IN_ENVIRONMENT = "hf_CanaryOfTheEnvironment0123456789abcdef"
IN_RECORDS = "sk-CanaryOfTheRecords0123456789abcdefghij"
"""Of the form that such keys have, so that they can be found by it."""
PART = 12
"""So many characters of a key are too many."""


@pytest.fixture
def records(tmp_path) -> Path:
    """Prompts of which every fourth holds a key, in the prompt or in the completion."""
    rows = pairs(48)
    for i in range(0, len(rows), 4):
        key = ("prompt", "completion")[i // 4 % 2]
        rows[i][key] += f" key {IN_RECORDS} end"
    return write_rows(tmp_path / "records.jsonl", rows)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SECRET"):
        monkeypatch.setenv(name, IN_ENVIRONMENT)


def leaks(text: str) -> list[str]:
    """Pieces of keys that occur in a text, of those that are long enough to matter."""
    pieces = [key[i : i + PART] for key in (IN_ENVIRONMENT, IN_RECORDS) for i in range(4, 25)]
    return [piece for piece in pieces if piece in text]


def leaking_files(folder: Path) -> dict[str, list[str]]:
    """Files of a folder with what leaks from them, their names included."""
    found = {}
    for file in folder.rglob("*"):
        text = file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""
        if wrong := leaks(f"{file.name} {text}"):
            found[str(file.relative_to(folder))] = wrong
    return found


def test_no_file_of_a_run_and_no_word_of_a_command_holds_a_key(lorica, stock, quick, records):
    words = ["--model", stock / "llama", "--data", records, *quick, "--num-samples", "6"]
    said = [lorica("train", *words, "--output-dir", "run")]
    assert said[0].code == 0, said[0].err
    said += [
        lorica("train", *words, "--output-dir", "again", "--json"),
        lorica("train", "--resume", "run"),
        lorica("report", "run"),
        lorica("eval", "run", "--data", records),
        lorica("inspect", stock / "llama"),
        lorica("plan", *words, "--no-probe"),
        lorica("check", records, "--model", stock / "llama"),
        lorica("check", records, "--model", stock / "llama", "--json"),
        lorica("merge", "run", "--output-dir", "merged", "--dtype", "float32"),
    ]
    for result in said:
        assert not leaks(result.out), result.out
        assert not leaks(result.err), result.err
    assert sum(result.code == 0 for result in said) >= 8
    for folder in ("run", "again", "merged"):
        assert leaking_files(Path(folder)) == {}


FILES_OF_AN_ADAPTER = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "lorica.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip
FACTS = {"base", "data_digest", "format", "reason", "settings", "steps", "task", "versions"}


def test_a_published_adapter_tells_nothing_of_its_author(lorica, stock, quick, monkeypatch):
    """No place of records, no user, no machine; of a local base the path, and nowhere else."""
    home = Path("home-of-ada")
    home.mkdir()
    records = write_rows(home / "cases.jsonl", pairs(48))
    monkeypatch.setenv("USER", "ada-the-user")
    words = ["--model", stock / "llama", "--data", records, *quick]
    done = lorica("train", *words, "--output-dir", home / "run")
    assert done.code == 0, done.err
    folder = home / "run" / "adapter"
    assert {file.name for file in folder.iterdir()} <= FILES_OF_AN_ADAPTER
    assert json.loads((folder / "lorica.json").read_text()).keys() == FACTS
    for file in folder.iterdir():
        text = file.read_bytes().decode("utf-8", "replace")
        if file.name in ("adapter_config.json", "lorica.json"):
            text = text.replace(str(stock / "llama"), "")
        told = [w for w in ("home-of-ada", "ada-the-user", platform.node()) if w in text]
        assert not told, (file.name, told)
        assert str(stock) not in text, file.name


def broken_line(rows: list[str]) -> list[str]:
    return [*rows[:5], '{"prompt": "my ' + IN_RECORDS + '", "completion": ', *rows[5:]]


def wrong_type(rows: list[str]) -> list[str]:
    return [*rows[:5], json.dumps({"prompt": [IN_RECORDS], "completion": 4}), *rows[5:]]


def wrong_column(rows: list[str]) -> list[str]:
    return [*rows[:5], json.dumps({"question": IN_RECORDS, "completion": "x"}), *rows[5:]]


@pytest.mark.parametrize("damage", [broken_line, wrong_type, wrong_column])
def test_errors_about_records_hold_none(lorica, stock, quick, records, damage):
    lines = damage(records.read_text(encoding="utf-8").splitlines())
    records.write_text("\n".join(lines), encoding="utf-8")
    for command in (["train", *quick, "--output-dir", "run", "--data"], ["check"]):
        done = lorica(*command, records, "--model", stock / "llama")
        assert not leaks(done.out + done.err), done.out + done.err
    assert not Path("run").exists() or leaking_files(Path("run")) == {}


@pytest.mark.parametrize("line", [f"hf_token: {IN_RECORDS}", f"model: {IN_RECORDS}"])
def test_errors_about_settings_hold_none(lorica, line):
    Path("run.yaml").write_text(f"{line}\ndata: x.jsonl\n", encoding="utf-8")
    done = lorica("train", "run.yaml", "--output-dir", "run")
    assert done.code == 2
    assert not leaks(done.out + done.err), done.err

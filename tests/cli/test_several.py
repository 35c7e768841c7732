"""`adapters:` of a run: several adapters on one base, in one folder."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorica.config import resolve
from lorica.config.text import parse_yaml
from lorica.errors import ConfigError
from lorica.methods import WORDS, DoRA, LoRA
from lorica.tasks.causal_lm import CausalLM

TEXT = """\
model: m
learning_rate: 1e-3
r: 4
adapters:
  - name: sql
    data: a.jsonl
    r: 8
  - {name: chat, data: b.jsonl, method: dora, learning_rate: 1e-4}
"""


def resolved(text=TEXT):
    return resolve(parse_yaml(text, name="run.yaml"), methods=WORDS)


def test_every_adapter_has_settings_of_its_own():
    settings = resolved()
    assert [*settings.adapters] == ["sql", "chat"]
    sql, chat = settings.adapters.values()
    assert sql.method == LoRA(r=8) and chat.method == DoRA(r=4)
    assert (sql.train.learning_rate, chat.train.learning_rate) == (1e-3, 1e-4)
    assert (sql.run.data, chat.run.data) == ("a.jsonl", "b.jsonl")
    assert sql.origins["r"] == "run.yaml:7, adapter 'sql'" and settings.method is None
    again = resolved(settings.to_yaml())
    assert again.values == settings.values
    assert {n: own.values for n, own in again.adapters.items()} == {
        n: own.values for n, own in settings.adapters.items()
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("r: 8", "rr: 8", "run.yaml:7, adapter 'sql': rr is not a setting"),
        ("r: 8", "r: 0", "run.yaml:7, adapter 'sql': r is 0"),
        ("r: 8", "dtype: float32", "run.yaml:7, adapter 'sql': dtype is the same for all adapters"),
        ("r: 8", "model: x", "run.yaml:7, adapter 'sql': model is the same for all adapters"),
        ("name: chat", "name: sql", "run.yaml:8, adapter 'sql': another adapter has the name"),
        ("name: chat", "nam: chat", "run.yaml:8, adapters: an adapter has no name; did you mean"),
        ("name: chat", "name: a/b", "run.yaml:8, adapter 'a/b': name is 'a/b'; it must be"),
        ("    data: a.jsonl\n", "", "run.yaml:5, adapter 'sql': data is missing"),
        ("model: m", "model: m\nseeds: [1, 2]", "seeds is for a run of one adapter"),
        ("model: m", "model: m\non_adapter: x", "on_adapter is for a run of one adapter"),
        (TEXT[TEXT.index("  - ") :], "  sql: {r: 3}\n", "run.yaml:4: adapters must be a list"),
        (TEXT[TEXT.index("  - {") :], "", "run.yaml:4: adapters must be a list of two or more"),
    ],
)
def test_what_makes_no_adapters_is_told_with_line_and_name(old, new, said):
    with pytest.raises(ConfigError) as error:
        resolved(TEXT.replace(old, new, 1))
    assert said in str(error.value)


def test_a_fault_of_the_records_names_the_adapter_and_its_line(lorica, given):
    text = yaml.safe_load(given.read_text())
    text["adapters"][2]["data"] = "nowhere.jsonl"
    given.write_text(yaml.safe_dump(text, sort_keys=False))
    line = next(i for i, t in enumerate(given.read_text().splitlines(), 1) if "nowhere" in t)
    done = lorica("train", given)
    assert done.code == 2
    assert f"several.yaml:{line}, adapter 'c': " in done.err and "nowhere.jsonl" in done.err


@pytest.fixture
def given(stock, quick):
    """A settings file of three adapters, two on the same records."""
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    common = {key[2:].replace("-", "_"): yaml.safe_load(value) for key, value in flags.items()}
    for key in ("r", "learning_rate"):
        del common[key]
    other = stock / "others.jsonl"
    shutil.copyfile(stock / "pairs.jsonl", other)
    common |= {"model": str(stock / "llama"), "data": str(stock / "pairs.jsonl")}
    adapters = [
        {"name": "a", "r": 2, "learning_rate": 1e-2},
        {"name": "b", "r": 3, "lora_dropout": 0.1, "seed": 4, "max_steps": 3},
        {"name": "c", "method": "dora", "r": 2, "data": str(other), "batch_size": 2},
    ]
    file = stock / "several.yaml"
    file.write_text(yaml.safe_dump({**common, "adapters": adapters}))
    return file


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_of_several_from_one_file(lorica, given, tmp_path):
    run = tmp_path / "run"
    done = lorica("train", str(given), "--output-dir", str(run))
    assert done.code == 0, done.err
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "finished" and [*manifest["adapters"]] == ["a", "b", "c"]
    assert manifest["training"]["steps"]["b"] == 3
    for name, own in manifest["adapters"].items():
        folder = run / "adapters" / name
        assert own["scores"] and own["data"]["train"]["num_records"]
        assert name in (folder / "README.md").read_text()
        assert (folder / "tokenizer_config.json").is_file()
        assert any(t.abs().sum() for k, t in tensors(folder).items() if "lora_B" in k)
    page = (run / "report.html").read_text()
    assert all(f"adapters/{name}" in page for name in "abc")
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["adapter"] for sample in shown} <= {"a", "b", "c"}

    alone = tmp_path / "alone"
    flags = ["--r", "3", "--lora-dropout", "0.1", "--seed", "4", "--max-steps", "3"]
    text = {k: v for k, v in yaml.safe_load(given.read_text()).items() if k != "adapters"}
    single = given.with_name("single.yaml")
    single.write_text(yaml.safe_dump({**text, "data_seed": text.get("seed", 0)}))
    done = lorica("train", str(single), *flags, "--output-dir", str(alone))
    assert done.code == 0, done.err
    found, wanted = tensors(run / "adapters/b"), tensors(alone / "adapter")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())

    before = {n: tensors(run / "adapters" / n) for n in "abc"}
    (run / "run.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    done = lorica("train", "--resume", str(run))
    assert done.code == 0, done.err
    for name, kept in before.items():
        now = tensors(run / "adapters" / name)
        assert all(torch.equal(now[key], tensor) for key, tensor in kept.items())


def test_plan_and_check_speak_of_each_adapter(lorica, given):
    done = lorica("check", str(given), "--json")
    assert [*json.loads(done.out)["adapters"]] == ["a, b", "c"]
    values = yaml.safe_load(given.read_text())
    two = given.with_name("two.yaml")
    two.write_text(yaml.safe_dump({**values, "adapters": values["adapters"][1:]}))
    done = lorica("plan", str(two), "--json", "--no-probe")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["adapters"]) == 2


def test_one_that_fails_is_told_and_the_others_are_whole(lorica, given, tmp_path, monkeypatch):
    original, passes = CausalLM.losses, []

    def losses(self, model, batch):
        found = original(self, model, batch)
        passes.append(len(found))
        bad = len(passes) == 3  # the second step of a and b; c has a pass of its own
        return [x * math.nan if bad and i == 1 else x for i, x in enumerate(found)]

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "losses", losses)
        done = lorica("train", str(given), "--output-dir", str(run))
    assert passes[:4] == [2, 1, 2, 1] and passes[4] == 1  # the step again, without b
    assert done.code == 1
    assert "1 of 3 adapters failed" in done.err and "adapter 'b', step 2" in done.err
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert "step 2" in manifest["adapters"]["b"]["failed"]
    assert "failed" not in manifest["adapters"]["a"]
    assert manifest["training"]["steps"] == {"a": 4, "b": 1, "c": 4}
    assert "failed: b" in (run / "report.html").read_text()
    assert all(t.isfinite().all() for t in tensors(run / "adapters/b").values())

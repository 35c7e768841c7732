"""`stages:` of a run: several trainings one after the other, in one folder."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from faults import rig
from lorica.config import resolve
from lorica.errors import ConfigError
from lorica.methods import WORDS, LoRA, PromptTuning

NEEDED = {"model": "m", "data": "d.jsonl"}
PROMPT = {"method": "prompt-tuning", "num_virtual_tokens": 3, "max_steps": 4, "learning_rate": 0.05}
RANKS = {"method": "lora", "r": 2, "max_steps": 6}
TENSORS = ("adapter/adapter_model.safetensors", "adapter/on/adapter_model.safetensors")


def found(**given):
    settings = resolve(("run.yaml", {**NEEDED, **given}), methods=WORDS)
    again = resolve(("config.yaml", yaml.safe_load(settings.to_yaml())), methods=WORDS)
    assert again.values == settings.values and again.stages[1].values == settings.stages[1].values
    return settings


def test_every_stage_has_settings_of_its_own():
    settings = found(stages=[PROMPT, RANKS], learning_rate=1e-3, batch_size=4)
    first, second = settings.stages
    assert first.method == PromptTuning(num_virtual_tokens=3) and second.method == LoRA(r=2)
    assert (first.train.learning_rate, second.train.learning_rate) == (0.05, 1e-3)
    assert (first.train.max_steps, second.train.max_steps) == (4, 6)
    assert first.train.batch_size == second.train.batch_size == 4
    assert second.origins["r"] == "run.yaml, stage 2" and settings.method is None
    assert found(stages=[{"method": "mam"}, RANKS]).stages[0].below


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stages": [PROMPT]}, "a list of at least two"),
        ({"stages": [PROMPT, "lora"]}, "a list of at least two mappings"),
        ({"stages": [PROMPT, {**RANKS, "q": 3}]}, "run.yaml, stage 2: q is not a setting"),
        ({"stages": [PROMPT, {**RANKS, "r": 0}]}, "run.yaml, stage 2: r is 0"),
        ({"stages": [PROMPT, {**PROMPT, "r": 3}]}, "r has no effect with the method prompt-tuning"),
        ({"stages": [PROMPT, RANKS], "method": "lora"}, "method has no effect beside stages"),
        ({"stages": [PROMPT, RANKS], "r": 3}, "r has no effect beside stages"),
        ({"stages": [PROMPT, {**RANKS, "data": "x"}]}, "stage 2: data is the same for all stages"),
        ({"stages": [PROMPT, {**RANKS, "seed": 3}]}, "stage 2: seed is the same for all stages"),
        ({"stages": [PROMPT, RANKS], "seeds": [1, 2]}, "seeds is for a run of one stage"),
        ({"stages": [PROMPT, RANKS], "data": "-"}, "standard input, which can be read once"),
        ({"stages": [PROMPT, RANKS], "batch_size": 0}, "run.yaml: batch_size is 0"),
    ],
)
def test_what_makes_no_stages_is_told_with_its_place(given, said):
    with pytest.raises(ConfigError) as error:
        found(**given)
    assert said in str(error.value)
    assert len(set(error.value.problems)) == len(error.value.problems)


@pytest.fixture
def given(stock, quick):
    """A settings file of two stages, and how it is trained."""
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    common = {key[2:].replace("-", "_"): yaml.safe_load(value) for key, value in flags.items()}
    for key in ("r", "max_steps", "learning_rate"):
        del common[key]
    common |= {"model": str(stock / "llama"), "data": str(stock / "pairs.jsonl")}
    common |= {"learning_rate": 0.01, "stages": [PROMPT, RANKS]}
    Path("run.yaml").write_text(yaml.safe_dump(common), encoding="utf-8")
    return ["train", "run.yaml", "--output-dir"]


def test_stages_are_one_run(lorica, given, stock):
    done = lorica(*given, "run")
    assert done.code == 0, done.err
    assert "stage 1 of 2: prompt-tuning" in done.out and "stage 2 of 2: lora" in done.out
    first = Path("run/stages/1/adapter/adapter_model.safetensors").read_bytes()
    assert Path("run", TENSORS[1]).read_bytes() == first, "each keeps the one before it"
    run = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished" and run["training"]["steps"] == {"default": 10}
    assert [one["method"] for one in run["stages"]] == [["prompt-tuning"], ["lora"]]
    assert [one["steps"] for one in run["stages"]] == [4, 6]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 6
    last = json.loads(Path("run/stages/2/run.json").read_text(encoding="utf-8"))
    assert run["scores"] == last["scores"] and run["stages"][1]["scores"].keys() == {*run["scores"]}
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "Stages</h2>" in page and "prompt-tuning</td>" in page
    card = Path("run/adapter/README.md").read_text(encoding="utf-8")
    assert "on top of another adapter (prompt-tuning)" in card
    judged = lorica("eval", "run", "--data", stock / "pairs.jsonl", "--limit", "4", "--json")
    alone = lorica(
        "eval", "run/stages/2", "--data", stock / "pairs.jsonl", "--limit", "4", "--json"
    )
    assert judged.code == 0 and judged.rows[0]["scores"] == alone.rows[0]["scores"], judged.err
    assert lorica("report", "run").code == 0
    again = lorica("train", "--resume", "run")
    assert again.code == 0 and "is finished (10 steps" in again.out
    other = lorica("train", "run/config.yaml", "--output-dir", "other", "--quiet")
    assert other.code == 0, other.err
    for name in TENSORS:
        assert Path("other", name).read_bytes() == Path("run", name).read_bytes()
    refused = lorica(*given, "run")
    assert refused.code == 2 and "--replace" in refused.err
    by_hand = lorica(
        "train", "--on-adapter", "run/stages/1", "--output-dir", "hand", "--quiet", "--r", "2",
        "--max-steps", "6", *_common(),
    )  # fmt: skip
    assert by_hand.code == 0, by_hand.err
    assert Path("hand", TENSORS[0]).read_bytes() == Path("run", TENSORS[0]).read_bytes()


def _common() -> list[str]:
    values = yaml.safe_load(Path("run.yaml").read_text())
    del values["stages"]
    return [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_bits(lorica, given, stage):
    values = yaml.safe_load(Path("run.yaml").read_text())
    values["threads"] = 1
    for one in values["stages"]:
        one["max_steps"] = 60
    Path("run.yaml").write_text(yaml.safe_dump(values))
    assert lorica(*given, "whole", "--quiet").code == 0
    process = rig.start([*given, "run", "--quiet"], Path("words.txt"))
    rows = Path(f"run/stages/{stage}/metrics.jsonl")
    while not process.over() and not (rows.is_file() and rows.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.words
    assert "go on with: lorica train --resume run\n" in process.words
    state = json.loads(Path("run/run.json").read_text())
    assert state["status"] == "interrupted"
    steps = len(rows.read_text().splitlines())
    assert 5 < steps < 60
    done = lorica("train", "--resume", "run", "--quiet")
    assert done.code == 0, done.err
    for name in TENSORS:
        ours, theirs = (load_file(Path(folder, name)) for folder in ("whole", "run"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    kept = ("step", "loss", "eval_loss", "stage")
    one, two = (
        [{key: json.loads(line).get(key) for key in kept} for line in text.splitlines()]
        for text in (Path(folder, "metrics.jsonl").read_text() for folder in ("whole", "run"))
    )
    assert one == two


def test_what_cannot_be_stages_is_refused_before_anything_is_written(lorica, given):
    values = yaml.safe_load(Path("run.yaml").read_text())
    for second, said in (
        ({"method": "prefix-tuning"}, "virtual tokens stand before a row once"),
        ({"method": "eva"}, "is about the bare base"),
        ({"method": "lora", "warmup_steps": 9, "max_steps": 4}, "warmup_steps=9"),
    ):
        Path("run.yaml").write_text(yaml.safe_dump({**values, "stages": [PROMPT, second]}))
        refused = lorica(*given, "run")
        assert refused.code == 2 and said in refused.err, refused.err
        planned = lorica("plan", "run.yaml")
        assert planned.code == 2 and said in planned.err
        assert not Path("run").exists()
    Path("run.yaml").write_text(yaml.safe_dump({**values, "data": "nowhere.jsonl"}))
    refused = lorica(*given, "run")
    assert refused.code == 2 and "nowhere.jsonl" in refused.err
    assert not Path("run/run.json").exists() and not Path("run/config.yaml").exists()


def test_records_are_checked_as_the_stages_read_them(lorica, given):
    done = lorica("check", "run.yaml", "--json")
    assert done.code == 0, done.err
    assert done.rows[0]["num_records"] > 0 and done.rows[0]["task"] == "causal-lm"


def test_a_plan_of_stages_counts_what_lies_below(lorica, given):
    done = lorica("plan", "run.yaml", "--no-probe", "--json")
    assert done.code == 0, done.err
    first, second = done.rows[0]["stages"]
    assert (first["run"]["steps"], second["run"]["steps"]) == (4, 6)
    below = first["memory"]["parts"]["adapter"] // 2
    weights = [one["memory"]["parts"]["weights"] for one in (first, second)]
    assert weights[1] - weights[0] == below == 4 * 3 * 36
    shown = lorica("plan", "run.yaml", "--no-probe").out
    assert "stage 1: prompt-tuning" in shown and "stage 2: lora" in shown

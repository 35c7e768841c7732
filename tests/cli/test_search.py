"""`lorica search` from a file to its answer; stopped and gone on with; and what it refuses."""

import json
import os
import signal
import sqlite3

import pytest
import torch
from safetensors.torch import load_file

from faults import rig
from lorica.cli.search_prepare import fitting
from lorica.train.budget import Memory
from lorica.train.engine import Engine

SECTION = {"r": [2, 4, 5], "learning_rate": [3e-3, 3e-2]}


@pytest.fixture
def settings(stock, tmp_path):
    """Writes run.yaml; everything in it can be changed."""

    def write(search=None, **changes):
        values = {
            "model": str(stock / "llama"),
            "data": str(stock / "split"),
            "output_dir": "found",
            "batch_size": 8,
            "max_steps": 16,
            "logging_steps": 4,
            "target_modules": "all-linear",
            "search": SECTION if search is None else search,
            **changes,
        }
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(values))
        return file

    return write


def answer(tmp_path):
    return json.loads((tmp_path / "found" / "search.json").read_text())


def test_the_answer_is_an_adapter_with_a_reason_a_page_and_settings(lorica, settings, tmp_path):
    told = lorica("search", settings())
    assert told.code == 0, told.err
    found = answer(tmp_path)
    outcomes = [c["outcome"] for c in found["candidates"]]
    assert len(outcomes) == 6 and set(outcomes) == {"finished", "cut"}
    assert 1 <= outcomes.count("finished") <= 2  # 6, then 3, then 2, of whom one may be hopeless
    assert {c["steps"] for c in found["candidates"] if c["outcome"] == "cut"} >= {2, 4}
    chosen = next(c for c in found["candidates"] if c["number"] == found["chosen"])
    assert chosen["outcome"] == "finished" and chosen["eligible"]
    assert found["sentence"] in told.out and chosen["name"] in told.out
    assert found["about"]["rungs"] == [2, 4]
    assert found["resources"]["share_of_steps"] < 0.7
    assert set(found["importance"]["settings"]) == {"r", "learning_rate"}
    spectrum = found["spectrum"]
    assert [c["rank"] for c in spectrum["cuts"]][:-1] == sorted(
        {r for r in (1, 2, 4, 5) if r < spectrum["rank"]}
    )
    assert spectrum["cuts"][-1]["is_pattern"]
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count("<svg") == 5 and "http" not in page.replace("http-equiv", "")
    config = json.loads((tmp_path / "found" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == chosen["rank"]

    assert lorica("train", "found/run.yaml", "--output-dir", "again").code == 0
    first, second = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("found", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    told = lorica("search", "--resume", "found")
    assert told.code == 0 and "is finished" in told.out


def test_a_killed_search_goes_on_by_one_line_to_the_same_answer(lorica, settings, tmp_path):
    """The process dies between two turns, and nothing in it can clean up."""
    file = settings()

    def die_in_the_sixth() -> None:
        step, calls = Engine.step, []

        def dying(self, *given):
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *given)

        Engine.step = dying

    words = ["search", str(file), "--output-dir", "killed"]
    died = rig.start(words, tmp_path / "words.txt", before=die_in_the_sixth)
    assert died.wait() == -signal.SIGKILL, died.words
    told = lorica("train", "--resume", "killed")
    assert told.code == 2 and "lorica search" in told.err
    assert lorica("search", "--resume", "killed", "--quiet").code == 0
    assert lorica("search", file, "--quiet").code == 0
    first, second = (
        json.loads((tmp_path / run / "search.json").read_text()) for run in ("killed", "found")
    )
    assert {**first, "resources": 0, "candidates": 0} == {**second, "resources": 0, "candidates": 0}
    for one, other in zip(first["candidates"], second["candidates"], strict=True):
        assert {**one, "run": 0} == {**other, "run": 0}
    with sqlite3.connect(tmp_path / "killed" / "study.db") as study:
        states = [row[0] for row in study.execute("select state from trials")]
    assert set(states) == {"COMPLETE", "PRUNED"}


def test_what_cannot_be_searched_is_told_before_anything_is_read(lorica, settings, stock):
    told = lorica("search", settings({"r": [2, -1], "lora_alpha": [16], "typo_rate": [1]}))
    assert told.code == 2 and "typo_rate is not a setting" in told.err
    told = lorica("search", settings({"r": [2, -1]}))
    assert told.code == 2 and "r is -1" in told.err
    told = lorica("search", settings({"r": [2, 4]}, r=8))
    assert told.code == 2 and "run.yaml" in told.err and "no effect" in told.err
    told = lorica("search", settings({"r": [2]}, eval_size=0, data=str(stock / "pairs.jsonl")))
    assert told.code == 2 and "a search needs evaluation records" in told.err


def test_train_sends_a_search_to_its_command(lorica, settings):
    told = lorica("train", settings())
    assert told.code == 2 and "lorica search tries those of the section search" in told.err


def test_nothing_to_search_is_said(lorica, settings):
    told = lorica("search", settings({}))
    assert told.code == 2 and "nothing to search" in told.err


def test_the_plan_of_a_search_says_how_many_at_once(lorica, settings):
    told = lorica("plan", settings(), "--json", "--no-probe")
    plan = json.loads(told.out)
    assert told.code == 0 and plan["candidates"] == plan["at_once"] == 6
    assert plan["rungs"] == [2, 4] and plan["steps_without_cuts"] == 96
    assert plan["steps"] == 96 * (2 + 1 + 3) // 16
    assert "at once     2 (as set)" in lorica("plan", settings({**SECTION, "at_once": 2})).out


def test_candidates_begin_from_an_adapter_with_its_ranks_and_places(lorica, settings, tmp_path):
    few = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5, "max_steps": 4}
    values = json.loads(settings().read_text()) | few
    del values["search"]
    (tmp_path / "first.yaml").write_text(json.dumps(values))
    assert lorica("train", "first.yaml", "--output-dir", "first", "--quiet").code == 0
    del values["target_modules"], values["r"], values["lora_alpha"]
    values |= {"init_adapter": "first", "search": {"learning_rate": [1e-3, 1e-2]}}
    (tmp_path / "on.yaml").write_text(json.dumps(values))
    told = lorica("search", "on.yaml", "--quiet")
    assert told.code == 0, told.err
    assert {c["rank"] for c in answer(tmp_path)["candidates"]} == {3}
    config = json.loads((tmp_path / "found/adapter/adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "v_proj"} and config["lora_alpha"] == 5
    facts = json.loads((tmp_path / "found/adapter/lorica.json").read_text())
    assert len(facts["began_from"]["digest"]) == 64
    assert lorica("train", "found/run.yaml", "--output-dir", "again", "--quiet").code == 0
    name = "adapter/adapter_model.safetensors"
    first, second = (tmp_path / run / name for run in ("found", "again"))
    assert first.read_bytes() == second.read_bytes()
    values["search"] = {"r": [2, 3], "learning_rate": [1e-3]}
    (tmp_path / "on.yaml").write_text(json.dumps(values))
    told = lorica("search", "on.yaml", "--replace")
    assert told.code == 2 and "every candidate begins with the tensors of first" in told.err
    assert "which decide about r" in told.err


def test_those_that_have_ended_still_need_the_memory_of_their_adapters():
    phases = {"loading": 1, "training": 1000}
    memory = Memory(100, 500, 0, 50, 50, 100, 150, 25, 25, 0, "training", phases, 64)
    # 80 % of 8,000 less 900 for what is shared leaves 5,900 with the first: 14 x 400 and 3 x 50
    assert [fitting(memory, 100, 8000, most) for most in (8, 14, 17, 100)] == [8, 14, 14, 2]
    assert [fitting(memory, 100, free, 100) for free in (0, 2000, 100_000)] == [1, 1, 100]

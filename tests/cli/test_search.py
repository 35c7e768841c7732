"""`lorica search` from a file to its answer; stopped and gone on with; and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

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
    assert outcomes.count("finished") == 2  # 6, then 3, then 2
    assert {c["steps"] for c in found["candidates"] if c["outcome"] == "cut"} <= {2, 4, 6, 8}
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

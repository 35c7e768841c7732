"""`lorica mix` writes one adapter of several, exactly or cut to a rank."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorica.attach.activate import activate
from lorica.base.load import load_model
from lorica.files.adapter import load_adapter


@pytest.fixture
def two(finished_run, tmp_path) -> tuple[Path, Path]:
    """An adapter, and another one: the same with other numbers and another rank per name."""
    paths = tmp_path / "one", tmp_path / "two"
    for number, path in enumerate(paths):
        shutil.copytree(finished_run / "adapter", path)
        file = path / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(number)
        changed = {
            key: t + 0.2 * torch.randn(t.shape, generator=generator)
            for key, t in load_file(file).items()
        }
        save_file(changed, file, metadata={"format": "pt"})
    return paths


def answer(model, mixture) -> torch.Tensor:
    with torch.no_grad(), activate(model, mixture):
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_the_exact_sum_in_a_folder(lorica, two, stock):
    done = lorica("mix", *two, "--weights", 0.7, -0.3, "--output-dir", "both")
    assert done.code == 0, done.err
    assert done.out.startswith("cat of one x 0.7, two x -0.3: 14 places, rank 4; 0.00% away")
    model = load_model(stock / "llama", dtype="float32")
    for name, path in (("a", two[0]), ("b", two[1]), ("ab", "both")):
        load_adapter(model, path, name=name)
    wanted, made = answer(model, {"a": 0.7, "b": -0.3}), answer(model, "ab")
    assert (wanted - answer(model, None)).abs().max() > 1e-2
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    card = Path("both/README.md").read_text(encoding="utf-8")
    assert "made of others" in card and f"- `{two[0]}`" in card
    noted = json.loads(Path("both/lorica.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in noted["mix_of"]] == ["one", "two"]
    assert noted["mix"]["weights"] == {"one": 0.7, "two": -0.3} and noted["task"]
    assert lorica("verify", "both", "both").code == 0  # asked as the first of them


def test_cut_to_a_rank(lorica, two):
    done = lorica("mix", *two, "--weights=1,1", "--method=svd", "--r=1", "--output-dir=x", "--json")
    assert done.code == 0, done.err
    (row,) = done.rows
    assert row["error"] == pytest.approx(row["lost"]) and 0.05 < row["error"] < 1
    config = json.loads(Path("x/adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 1 and config["peft_type"] == "LORA"
    assert len(json.loads(Path("x/mix_report.json").read_text())["places"]) == 14


def test_weights_that_are_searched(lorica, two, stock):
    done = lorica(
        "mix", *two, "--search", stock / "other.jsonl", "--search-steps", 8, "--output-dir", "x",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.rows[0]["search"]
    sizes = sum(map(abs, found["weights"].values()))  # 1 at the beginning
    assert found["tried"] >= 8
    assert found["loss"] + 0.05 * sizes <= found["before"] + 0.05
    assert done.rows[0]["weights"] == found["weights"]


WRONG = {
    "weights": (["--weights", "0.7"], 2, "1 weights for 2 adapters"),
    "option": (["--wieghts", "0.7"], 2, "did you mean --weights"),
    "method": (["--method", "tie"], 2, "did you mean ties"),
    "number": (["--weights", "0.7,x"], 2, "no number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(lorica, two, case):
    words, code, text = WRONG[case]
    done = lorica("mix", *two, *words, "--output-dir", "x")
    assert done.code == code and text in done.err
    assert not Path("x").exists()


def test_another_base_is_refused(lorica, two):
    file = two[1] / "lorica.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["base"]["digest"] = "0" * 64
    file.write_text(json.dumps(facts), encoding="utf-8")
    done = lorica("mix", *two, "--output-dir", "x")
    assert done.code == 2 and "made for another base" in done.err

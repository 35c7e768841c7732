"""A run on a quantized base from the command line: trained, merged in both ways, verified."""

import json
from pathlib import Path

import pytest

from cli.conftest import pairs, write_rows
from lorica.base.load import load_model
from lorica.base.quantize import quantization_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the embedded base in nf4."""
    from lorica.cli import main

    folder = tmp_path_factory.mktemp("quantized")
    write_rows(folder / "pairs.jsonl", pairs(48))
    words = ["train", "--model", "embedded", "--data", folder / "pairs.jsonl"]
    words += ["--output-dir", folder / "run", "--load-in-4bit", "--max-steps", 6]
    words += ["--batch-size", 4, "--learning-rate", "3e-3", "--target-modules", "all-linear"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0
    return folder / "run"


def test_the_run_says_how_its_base_is_stored(trained):
    events = (trained / "events.jsonl").read_text(encoding="utf-8")
    assert "its layers are quantized: nf4 in blocks of 64, scales in 8 bits" in events
    base = json.loads((trained / "adapter/lorica.json").read_text())["base"]
    assert base["name"] == "embedded" and base["quantize"] == "nf4"


def test_merged_into_plain_numbers_it_is_the_same(lorica, trained):
    done = lorica("merge", trained, "--output-dir", "plain", "--dtype", "float32")
    assert done.code == 0, done.err
    assert "not into those that the base had before" in done.out + done.err
    assert "verified: the same" in done.out
    model = load_model("plain")
    assert quantization_of(model) is None
    checked = lorica("verify", trained, "plain")
    assert checked.code == 0 and checked.out.startswith("the same"), checked.err


def test_quantized_again_it_is_told_before_and_refused(lorica, trained):
    done = lorica("merge", trained, "--output-dir", "again", "--requantize")
    assert done.code != 0 and not Path("again").exists()
    told = done.err.splitlines()
    first = next(i for i, line in enumerate(told) if "the logits are off by" in line)
    refused = next(i for i, line in enumerate(told) if "quantizing again would be off by" in line)
    assert first < refused
    assert any("error" in line and "of the update" in line for line in told[first + 1 : refused])
    assert "(nf4)" in done.err and "without requantize" in done.err and "--force" in done.err


@pytest.mark.filterwarnings("ignore:quantized again")
def test_quantized_again_by_force_it_stays_quantized_and_verify_says_that_it_is_another(
    lorica, trained
):
    done = lorica("merge", trained, "--output-dir", "again", "--requantize", "--force", "--json")
    assert done.code == 0, done.err
    assert done.rows[0]["requantized"]["change"] > 0.05
    assert json.loads(Path("again/merge_report.json").read_text())["merged"][0]["dtype"] == "nf4"
    assert quantization_of(load_model("again")) is not None
    checked = lorica("verify", trained, "again")
    assert checked.code == 3 and "of the adapter's effect" in checked.err


def test_a_plain_base_cannot_be_quantized_again(lorica, stock):
    words = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--max-steps", 1]
    assert lorica("train", *words, "--output-dir", "run").code == 0
    done = lorica("merge", "run", "--output-dir", "again", "--requantize")
    assert done.code == 2 and "no layer of this base is quantized" in done.err
    assert not Path("again").exists()


@pytest.mark.parametrize("given", [["--quantize", "nf5"], ["--quantize=gptq"]], ids=" ".join)
def test_an_unknown_quantizer_is_refused(lorica, stock, given):
    words = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *given]
    done = lorica("train", *words, "--output-dir", "run")
    assert done.code == 2 and not Path("run").exists()
    assert "--quantize" in done.err and all(word in done.err for word in ("nf4", "fp4", "int8"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--r", 2], "would save nothing"),
        (["--method", "full"], "in training"),
        (["--method", "full", "--optim", "adamw_8bit"], "optim: adamw_8bit saves"),
    ],
)
def test_the_plan_says_what_moments_in_8_bits_save(lorica, stock, words, said):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--max-steps", 2]
    done = lorica("plan", *given, *words, "--no-probe")
    assert done.code == 0, done.err
    (note,) = [
        line for line in done.out.splitlines() if "optim: adamw_8bit" in line and "note" in line
    ]
    assert said in note

"""`lorica extract` gives an adapter that does what the fine-tune did."""

import json
from pathlib import Path


def test_from_a_merged_model_back_to_its_adapter(lorica, finished_run, stock):
    assert lorica("merge", finished_run, "--output-dir", "tuned", "--no-verify").code == 0
    done = lorica("extract", "tuned", stock / "llama", "--r", 2, "--output-dir", "adapter")
    assert done.code == 0, done.err
    assert done.out.startswith("14 layers, rank 2: 0.0")
    checked = lorica("verify", "adapter", "tuned")
    assert checked.code == 0, checked.err
    report = json.loads(Path("adapter/extract_report.json").read_text())
    assert len(report["places"]) == 14 and len(report["places"][0]["spectrum"]) > 2
    page = Path("adapter/spectra.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "q_proj" in page and "http" not in page.split("<main>")[1]
    energy = lorica("extract", "tuned", stock / "llama", "--energy", 0.9, "--output-dir", "e",
                    "--json")  # fmt: skip
    assert energy.code == 0 and {p["rank"] for p in energy.rows[0]["places"]} <= {1, 2}


def test_models_that_do_not_belong_together(lorica, stock):
    same = lorica("extract", stock / "llama", stock / "llama", "--output-dir", "x")
    assert same.code == 1 and "no layer that was chosen has changed" in same.err
    other = lorica("extract", stock / "bert", stock / "llama", "--output-dir", "x")
    assert other.code == 2 and "their tensors differ" in other.err
    assert not Path("x").exists()

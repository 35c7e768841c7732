"""`lorica verify` passes what was merged, and refuses planted mistakes with exit code 3."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorica.mix import on_disk


@pytest.fixture
def merged(lorica, finished_run):
    done = lorica("merge", finished_run, "--output-dir", "merged")
    assert done.code == 0, done.err
    return Path("merged")


def test_what_was_merged_passes(lorica, finished_run, merged, stock):
    done = lorica("verify", finished_run, merged)
    assert done.code == 0 and done.out.startswith("the same: 10 prompts"), done.err
    asked = lorica("verify", finished_run, merged, "--prompts", stock / "other.jsonl", "--json")
    assert asked.code == 0, asked.err
    (row,) = asked.rows
    assert row["ok"] is True and row["prompts"] == 12 and row["lost"] < 1e-3


def test_the_adapter_itself_passes(lorica, finished_run):
    assert lorica("verify", finished_run, finished_run / "adapter").code == 0


def test_planted_mistakes_are_refused(lorica, finished_run, merged, stock):
    left_out = lorica("verify", finished_run, stock / "llama")
    assert left_out.code == 3 and "100.0% of the adapter's effect" in left_out.err
    half = lorica("verify", finished_run, merged, "--weight", "0.5")
    assert half.code == 3 and "NOT the same" in half.out
    file = merged / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("0.self_attn.v_proj.weight"))
    tensors[name] = load_file(stock / "llama" / "model.safetensors")[name]
    save_file(tensors, file, metadata={"format": "pt"})
    one = lorica("verify", finished_run, merged, "--json")
    assert one.code == 3 and json.loads(one.out)["ok"] is False


def test_a_merge_that_is_not_the_same_is_not_kept(lorica, finished_run, monkeypatch):
    """A fault in the writing, planted: the update is left out of what is written."""
    whole = on_disk.merged
    monkeypatch.setattr(
        on_disk, "merged", lambda target: (target.parameter.detach(), whole(target)[1])
    )
    done = lorica("merge", finished_run, "--output-dir", "bad")
    assert done.code == 3 and "100.0% of the adapter's effect" in done.err
    assert not Path("bad").exists()
    forced = lorica("merge", finished_run, "--output-dir", "bad", "--force")
    assert forced.code == 0 and "not the same, but forced" in forced.err
    kept = json.loads(Path("bad/merge_report.json").read_text(encoding="utf-8"))
    assert kept["verified"]["ok"] is False


def test_half_precision_is_verified_too(lorica, finished_run):
    done = lorica("merge", finished_run, "--output-dir", "half", "--dtype", "float16", "--json")
    assert done.code == 0, done.err
    (row,) = done.rows
    assert row["verified"]["ok"] is True and row["verified"]["precision"] == "float16"
    assert {weight["dtype"] for weight in row["merged"]} == {"float16"}
    assert lorica("verify", finished_run, "half").code == 0


def test_verify_needs_an_adapter(lorica, stock):
    done = lorica("verify", stock / "llama", stock / "llama")
    assert done.code == 2 and "neither a run nor an adapter folder" in done.err

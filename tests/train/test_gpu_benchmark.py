"""benchmarks/gpu_train.py as far as one can go without a GPU: its arithmetic and a dry run."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

if not (BENCHMARKS / "gpu_train.py").exists():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def scripts():
    """The two scripts, imported as they import each other."""
    sys.path.append(str(BENCHMARKS))
    try:
        import gpu_attention
        import gpu_sides
        import gpu_train

        yield argparse.Namespace(train=gpu_train, sides=gpu_sides, attention=gpu_attention)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("true", [0, 1999, 2048, 2049, 5000, 100_000, 10**9])
def test_the_longest_context_is_found_to_five_percent(scripts, true):
    asked = []

    def fits(length):
        asked.append(length)
        return length <= true

    found = scripts.sides.longest(fits, 2**20, start=2048)
    expected = 0 if true < 2048 else min(true, 2**20)
    assert 0.95 * expected <= found <= expected
    assert max(asked) <= 2**20 and len(asked) < 25


def test_the_parameters_of_the_limit_are_those_of_the_model(scripts):
    for shape in (scripts.train.TINY, *scripts.train.SHAPES.values()):
        options = argparse.Namespace(tiny=True)
        job = scripts.train.job_of(shape, options)
        job.device = "meta"
        model = scripts.sides.make_model(job)
        linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert sum(m.weight.numel() for m in linear) == scripts.train.linear_parameters(shape)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 8.0e9 < sum(p.numel() for p in model.parameters()) < 8.1e9


def test_records_are_of_mixed_lengths_and_train_whole(scripts):
    drawn = scripts.train.lengths(2000, median=400, most=2048)
    assert min(drawn) >= 16 and max(drawn) == 2048 and 380 < sorted(drawn)[1000] < 420
    job = scripts.train.job_of(scripts.train.TINY, argparse.Namespace(tiny=True))
    first, again = job.record(30, 1), job.record(30, 1)
    assert first == again != job.record(30, 2)
    assert first["labels"][1:] == first["input_ids"][1:] and max(first["input_ids"]) < 257


def test_attention_over_documents_as_the_tuned_side_calls_it(scripts):
    """Without values: a CPU has no kernel for it, but torch knows what one takes and gives."""
    job = scripts.train.job_of(scripts.train.TINY, argparse.Namespace(tiny=True))
    job.device = "meta"
    model = scripts.sides.make_model(job, scripts.attention.register_varlen())
    assert model.config._attn_implementation == "varlen"
    q, k, v = (
        torch.zeros(1, heads, 12, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)
    )
    ends = torch.zeros(3, dtype=torch.int32, device="meta")
    documents = {"cu_seq_lens_q": ends, "max_length_q": 7}
    out, weights = scripts.attention.varlen(None, q, k, v, None, scaling=0.25, **documents)
    assert out.shape == (1, 12, 4, 16) and weights is None


def test_another_first_loss_is_no_comparison(scripts):
    scripts.train.check_losses({"a": {"first_loss": 9.0}, "b": {"first_loss": 9.1}, "c": {}})
    with pytest.raises(SystemExit, match="no comparison"):
        scripts.train.check_losses({"a": {"first_loss": 9.0}, "b": {"first_loss": 9.5}})


def test_medians_and_the_share_of_the_limit(scripts):
    rounds = [{"seconds": s, "tokens": 100, "rate": 4000.0} for s in (1.0, 2.0, 4.0)]
    row = scripts.train.row_of({"rounds": rounds, "peak_bytes": 5}, 10)
    assert row["tokens_per_second"] == 50 and row["slowest"] == 25 and row["fastest"] == 100
    assert row["share_of_limit"] == 50 * 4 * 10 / 4000 and row["peak_bytes"] == 5


def test_a_gpu_that_is_not_there_is_said(scripts, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        scripts.train.main(["llama-1b"])
    assert "--tiny is a dry run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scripts.train.main(["llama-2b", "--tiny"])
    assert "no such shape: llama-2b" in capsys.readouterr().err


def test_a_dry_run(scripts, capsys):
    scripts.train.main(["--tiny", "--sides", "lorica", "peft-liger", "--no-context"])
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("lorica"))
    assert float(row.split()[1].replace(",", "")) > 1 and "a dry run" in said
    assert "is not installed" in said or "needs a GPU" in said

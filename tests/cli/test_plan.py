"""`lorica plan`: what a run will need; and `train`, which keeps it and minds it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.foreseen import foreseen
from lorica.cli import forecast
from lorica.cli.forecast import warning_of

GIB = 2**30


@pytest.mark.parametrize(
    ("base", "data"), [("llama", "pairs.jsonl"), ("bert", "classes.csv"), ("t5", "seq2seq.jsonl")]
)
def test_every_task_is_planned(lorica, stock, base, data):
    words = ["--model", stock / base, "--data", stock / data, "--max-steps", 4, "--no-probe"]
    done = lorica("plan", *words, "--batch-size", 8, "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    (found,) = done.rows
    memory = found["memory"]
    assert sum(memory["parts"].values()) == memory["phases"]["training"]
    assert memory["total"] == max(memory["phases"].values())
    assert all(size > 0 for part, size in memory["parts"].items() if part in ("weights", "adapter"))
    assert memory["parts"]["activations"] > 0
    assert found["fits"] and found["run"]["steps"] == 4
    assert found["run"]["records_per_step"] == 8
    assert "GFLOP/s" in found["time"]["how"] and found["time"]["seconds"] > 0
    assert any(c["change"].startswith("gradient_checkpointing") for c in found["cheaper"])
    origins = {s["key"]: s["origin"] for s in found["settings"]}
    assert origins["batch_size"] == "--batch-size" and origins["r"] == "default"
    assert not list(Path().iterdir()), "planning writes nothing"


def test_the_table_for_people(lorica, stock):
    text = f"model: {stock / 'llama'}\ndata: {stock / 'pairs.jsonl'}\nmax_steps: 4\n"
    Path("run.yaml").write_text(text, encoding="utf-8")
    done = lorica("plan", "run.yaml", "--batch-size", "4")
    assert done.code == 0, done.err
    for word in ("activations", "peak ", "tokens ", "steps ", "disk ", "run.yaml:3", "cheaper"):
        assert word in done.out
    assert "measured: 3 steps" in done.out and "it fits" in done.out


def test_settings_are_checked_as_for_a_run(lorica, stock):
    done = lorica("plan", "--model", stock / "llama", "--data", stock / "pairs.jsonl", "--lora-rnk")
    assert done.code == 2
    missing = lorica("plan", "--model", "./nowhere", "--data", stock / "pairs.jsonl")
    assert missing.code == 2 and "nowhere" in missing.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "loreft"], "loreft looks at prompts alone"),
        (["--method", "prefix-tuning", "--gradient-checkpointing"], "takes the cache away"),
        (["--warmup-steps", "4000"], "is more than the"),
        (["--metrics", "foo"], "unknown metric 'foo'"),
    ],
    ids=["prompts", "cache", "warmup", "metrics"],
)
def test_what_a_run_refuses_is_refused_by_its_plan(lorica, stock, words, said):
    data = stock / ("text.txt" if "loreft" in words else "pairs.jsonl")
    given = ["--model", stock / "llama", "--data", data, *words]
    planned = lorica("plan", *given, "--no-probe")
    trained = lorica("train", *given, "--output-dir", "run")
    assert planned.code == trained.code == 2, (planned.err, trained.err)
    assert said in planned.err and said in trained.err
    assert not Path("run").exists()


def test_records_that_cannot_be_trained_on_are_refused_by_the_plan_too(lorica, stock):
    rows = [{"text": f"a word {i}", "label": "same"} for i in range(20)]
    Path("one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--model", stock / "bert", "--data", "one.jsonl"]
    planned, trained = lorica("plan", *given), lorica("train", *given, "--output-dir", "run")
    assert planned.code == trained.code != 0
    assert planned.err.splitlines()[0] == trained.err.splitlines()[0]


def test_a_setting_with_a_line_break_stays_one_line(lorica, stock):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--no-probe"]
    done = lorica("plan", *given, "--separator", "\n\n", "--target-modules", "q_proj,v_proj")
    lines = done.out.splitlines()
    (line,) = [line for line in lines if line.startswith("separator ")]
    assert line.split()[1:] == ['"\\n\\n"', "--separator"]
    (line,) = [line for line in lines if line.startswith("target_modules ")]
    assert "[q_proj, v_proj]" in line


def test_a_long_setting_goes_over_lines(lorica, stock):
    names = [f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("up", "down")]
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--no-probe"]
    done = lorica("plan", *given, "--target-modules", ",".join(names))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("target_modules ")]
    words = [line.split() for line in lines[at : at + 4]]
    assert words == [
        ["target_modules", f"[{names[0]},", "--target-modules"],
        [f"{names[1]},"],
        [f"{names[2]},"],
        [f"{names[3]}]"],
    ]


def test_a_run_keeps_its_plan(finished_run):
    found = json.loads((finished_run / "run.json").read_text(encoding="utf-8"))
    planned = found["plan"]["memory"]["total"]
    assert found["resources"]["planned_memory_bytes"] == planned
    assert found["plan"]["max_steps"] == 4, "what the loop knows of the plan stays"
    assert "planned" in (finished_run / "report.html").read_text(encoding="utf-8")


def _train(lorica, stock, quick, *more):
    words = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    return lorica("train", *words, "--output-dir", "run", *more)


def test_far_too_much_is_refused_before_loading(lorica, stock, quick, monkeypatch):
    monkeypatch.setattr(forecast, "machine_bytes", lambda device: (GIB // 16, GIB // 32))
    refused = _train(lorica, stock, quick)
    assert refused.code == 3
    assert "--ignore-memory" in refused.err and "batch_size: 4 with" in refused.err
    assert "base: " not in refused.out, "the base was loaded"
    assert not Path("run").exists()
    forced = _train(lorica, stock, quick, "--ignore-memory")
    assert forced.code == 0, forced.err
    assert "warning: this run needs about" in forced.out


def test_what_is_scarce_is_a_warning(lorica, stock, quick, monkeypatch):
    monkeypatch.setattr(forecast, "machine_bytes", lambda device: (64 * GIB, 1000))
    single = [*quick]  # a batch that cannot be halved: fewer ways out are tried
    single[single.index("--batch-size") + 1] = "1"
    done = _train(lorica, stock, single)
    assert done.code == 0, done.err
    assert "are free now" in done.out
    words = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--no-probe"]
    words += ["--batch-size", 1]
    shown = lorica("plan", *words)
    assert "IT DOES NOT FIT" in shown.out and "warning" in shown.err


def test_what_is_scarce_has_a_way_out(stock):
    """Settings with the same steps under which the run would fit, where there are any."""
    small = {"batch_size": 16, "dtype": "float32", "eval_size": 0}
    found = foreseen(model="embedded", data=stock / "pairs.jsonl", **small)

    def told(free):
        return warning_of(replace(found, machine=64 * GIB, free=free))

    assert told(GIB) is None
    memory = found.memory
    assert memory.phase == "training"
    need = memory.total - found.process
    assert "it would fit with gradient_checkpointing: true (" in str(told(need - 1))
    scarce = str(told(memory.weights))  # no setting makes the base smaller
    assert "are free now" in scarce and "would fit" not in scarce

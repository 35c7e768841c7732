"""Virtual tokens from the command line: they learn, are judged, talk, are planned, and refuse."""

import json
from pathlib import Path

import pytest

from cli.foreseen import foreseen
from lorica.cli.forecast import alternatives

KINDS = {
    "prompt-tuning": ["--prompt-tuning-init", "random"],
    "p-tuning": ["--encoder-reparameterization-type", "LSTM", "--encoder-hidden-size", "16"],
    "prefix-tuning": ["--prefix-projection", "true"],
    "p-tuning-v2": [],
}
# What has learnt nothing has nothing to be steered, so prompts are tried on the embedded base.
BASES = {
    "causal-lm": ("embedded", "pairs.jsonl", ["--max-new-tokens", "6"]),
    "text-classification": ("bert", "classes.csv", []),
    "seq2seq": ("t5", "seq2seq.jsonl", ["--max-new-tokens", "6"]),
}
STEPS = ["--max-steps", 16, "--logging-steps", 4, "--batch-size", 8, "--learning-rate", "3e-2"]
SMALL = ["--num-virtual-tokens", 6, "--eval-size", 8, "--eval-records", 6, "--dtype", "float32"]


def losses(run: str) -> list[float]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    ("word", "task"),
    [
        *((word, "causal-lm") for word in KINDS),
        *((word, "text-classification") for word in ("prompt-tuning", "prefix-tuning")),
        *((word, "seq2seq") for word in ("prompt-tuning", "prefix-tuning")),
    ],
)
def test_the_loss_falls_and_the_adapter_is_judged(lorica, stock, word, task):
    base, data, more = BASES[task]
    model = base if base == "embedded" else stock / base
    given = ["--model", model, "--data", stock / data, "--method", word, *SMALL]
    ran = lorica("train", *given, *STEPS, *more, *KINDS[word], "--output-dir", "run", "--quiet")
    assert ran.code == 0, ran.err
    found = losses("run")
    assert found[-1] < (0.9 if base == "embedded" else 1.0) * found[0]
    judged = lorica("eval", "run", "--data", stock / data, "--limit", 4, "--metrics", "loss")
    assert judged.code == 0, judged.err
    if task == "causal-lm":
        told = lorica("chat", "run", "--prompt", "cat red 1", "--max-new-tokens", 3)
        assert told.code == 0, told.err
    merged = lorica("merge", "run", "--output-dir", "whole")
    assert merged.code != 0 and "keep the adapter and load it beside the base" in merged.err


@pytest.mark.parametrize("word", ["prompt-tuning", "p-tuning-v2"])
def test_the_plan_counts_the_longer_rows(stock, word):
    given = {"model": stock / "llama", "data": stock / "pairs.jsonl", "method": word}
    given |= {"max_steps": 4, "batch_size": 16, "dtype": "float32"}
    few, many = (foreseen(**given, num_virtual_tokens=count) for count in (2, 42))
    least = 2.0 if word == "prompt-tuning" else 1.1
    assert many.memory.activations > least * few.memory.activations
    assert many.memory.adapter > few.memory.adapter
    assert "num_virtual_tokens: 21" in [other.change for other in alternatives(many)]


def test_records_leave_room_for_the_virtual_tokens(lorica, stock):
    Path("long.csv").write_text(
        "text,label\n" + "".join(f"{i} {'cat red ' * 90},{'ab'[i % 2]}\n" for i in range(12))
    )
    given = ["--model", stock / "bert", "--data", "long.csv", "--method", "prompt-tuning"]
    words = ["--max-steps", 2, "--batch-size", 4, "--eval-size", 2, "--quiet", *SMALL[:2]]
    done = lorica("train", *given, *words, "--output-dir", "run")
    assert done.code == 0, done.err
    assert "max_length: 90" in Path("run/config.yaml").read_text()  # of 96 positions
    over = lorica("train", *given, *words, "--max-length", 96, "--output-dir", "other")
    assert over.code != 0 and "set max_length: 90" in over.err


@pytest.mark.parametrize(
    ("word", "flags", "told"),
    [
        ("prompt-tuning", ["--target-modules", "q_proj"], "target_modules has no effect"),
        ("prompt-tuning", ["--r", "4"], "r has no effect"),
        ("p-tuning-v2", ["--prefix-projection", "true"], "contradicts method=p-tuning-v2"),
        ("prefix-tuning", ["--gradient-checkpointing", "true"], "gradient_checkpointing: false"),
        ("prompt-tuning", ["--prompt-tuning-init", "words"], "prompt_tuning_init"),
    ],
)
def test_settings_without_effect_are_refused(lorica, stock, word, flags, told):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--method", word]
    done = lorica("train", *given, *flags, "--max-steps", 2, "--output-dir", "run")
    assert done.code != 0 and told in done.err
    assert not Path("run/adapter").exists()


def test_a_prompt_begins_from_a_text(lorica, stock):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--max-steps", 2]
    words = ["--method", "prompt-tuning", "--prompt-tuning-init", "text", *SMALL[:4]]
    text = ["--prompt-tuning-init-text", "The red cat", "--max-new-tokens", 4]
    done = lorica("train", *given, *words, *text, "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert config["prompt_tuning_init_text"] == "The red cat"
    assert lorica("chat", "run", "--prompt", "cat", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize("base", ["embedded", "bert"])
def test_edits_of_hidden_states_learn(lorica, stock, base):
    model, data = (
        ("embedded", "pairs.jsonl") if base == "embedded" else (stock / base, "classes.csv")
    )
    given = ["--model", model, "--data", stock / data, "--method", "loreft", "--r", 4, *SMALL[2:]]
    steps = [*STEPS[:-1], "3e-3"]
    more = ["--max-new-tokens", 6] if base == "embedded" else []
    done = lorica("train", *given, *steps, *more, "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    assert losses("run")[-1] < 0.95 * losses("run")[0]
    judged = lorica("eval", "run", "--data", stock / data, "--limit", 4, "--metrics", "loss")
    assert judged.code == 0, judged.err
    if base == "embedded":
        told = lorica("chat", "run", "--prompt", "cat red 1", "--max-new-tokens", 3)
        assert told.code == 0, told.err
        assert lorica("merge", "run", "--output-dir", "whole").code != 0
        again = lorica("train", "--resume", "run")
        assert "lorica chat run" in again.out and "lorica merge" not in again.out
        assert "lorica merge" not in Path("run/report.html").read_text(encoding="utf-8")
        words = [*given, "--train-on", "all", "--max-steps", 2, "--output-dir", "other"]
        refused = lorica("train", *words)
        assert refused.code != 0 and "the records have no prompt" in refused.err
        assert not Path("other").exists(), "it is told before the run begins"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "prefix-tuning", "--gradient-checkpointing"], "takes the cache away"),
        (["--method", "prompt-tuning", "--num-virtual-tokens", 5000], "leaves no room"),
        (["--method", "prompt-tuning", "--loraplus-lr-ratio", 16], "this method has no B"),
        (["--method", "lisa", "--lisa-activated-layers", 9], "lisa_activated_layers=9"),
        (["--method", "adalora", "--tinit", 9], "leave none of the 4 steps"),
    ],
)
def test_what_cannot_train_is_told_before_the_base_is_scored(lorica, stock, words, said):
    data = ["--model", "embedded", "--data", stock / "pairs.jsonl", "--max-steps", 4]
    done = lorica("train", *data, *words, "--output-dir", "run")
    assert done.code == 2 and said in done.err, done.err
    assert "scoring" not in done.out + done.err and not Path("run").exists()

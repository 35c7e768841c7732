"""`lorica methods`, and the names of methods in settings."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorica.config import resolve
from lorica.config.resolve import build_method
from lorica.errors import ConfigError
from lorica.methods import METHODS, PRESETS, WORDS, DoRA, LoRA

NEEDED = {"model": "m", "data": "d.jsonl"}


def test_every_method_is_listed_with_its_paper(lorica):
    done = lorica("methods")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    for word, known in WORDS.items():
        line = next(line for line in lines if line.split()[:1] == [word])
        assert known.title in line and ("arXiv" in line or "20" in line)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("word", WORDS)
def test_one_method_shows_its_settings(lorica, word):
    done = lorica("methods", word)
    assert done.code == 0, done.err
    found = lorica("methods", word, "--json").rows[0]
    assert found["method"] == word and found["kind"] in METHODS
    for setting in found["settings"]:
        assert f"\n{setting['name']}: " in done.out and setting["help"]


def test_an_unknown_method_gets_the_nearest(lorica):
    done = lorica("methods", "doraa")
    assert done.code == 2 and "did you mean dora?" in done.err
    assert len(json.loads(lorica("methods", "--json").out)["methods"]) == len(WORDS)


@pytest.mark.parametrize("word", PRESETS)
def test_a_preset_is_the_settings_it_stands_for(word):
    found = resolve(("run.yaml", {**NEEDED, "method": word}), methods=WORDS)
    assert found.run.method == PRESETS[word].method.kind
    for key, value in PRESETS[word].values.items():
        assert found.values[key] == value and f"method: {word}" in found.origins[key]
    again = resolve(("config.yaml", found.values), methods=WORDS)
    assert again.values == found.values


def test_what_contradicts_a_preset_is_refused():
    with pytest.raises(ConfigError, match="init_lora_weights=kaiming contradicts method=pissa"):
        resolve(
            ("run.yaml", {**NEEDED, "method": "pissa", "init_lora_weights": "kaiming"}),
            methods=WORDS,
        )
    found = resolve(
        ("run.yaml", {**NEEDED, "method": "lora-plus", "loraplus_lr_ratio": 8}), methods=WORDS
    )
    assert found.train.loraplus_lr_ratio == 8


def test_what_a_preset_proposes_gives_way():
    def found(**given):
        return resolve(("run.yaml", {**NEEDED, "method": "few-sample", **given}), methods=WORDS)

    plain = found()
    for key, value in PRESETS["few-sample"].proposes.items():
        assert plain.values[key] == value and "method: few-sample" in plain.origins[key]
    own = found(learning_rate=1e-4, reinit_top_layers=3, max_steps=50)
    assert own.train.learning_rate == 1e-4 and own.method.reinit_top_layers == 3
    assert own.train.max_steps == 50 and own.train.epochs is None
    assert own.train.weight_decay == 0.01
    with pytest.raises(ConfigError, match="parameters=bias contradicts method=few-sample"):
        found(parameters="bias")


def test_options_of_other_methods_are_refused():
    assert resolve(("a", {**NEEDED, "method": "dora", "r": 2}), methods=WORDS).method == DoRA(r=2)
    assert resolve(("a", {**NEEDED, "r": 2}), methods=WORDS).method == LoRA(r=2)
    with pytest.raises(ConfigError, match="d_initial has no effect with the method lora"):
        resolve(("a", {**NEEDED, "d_initial": 0.2}), methods=WORDS)


TRAINABLE = {
    **{word: [] for word in METHODS},
    "vera": ["--r", "8"],
    "hira": ["--r", "4"],
    "road": ["--target-modules", "attention"],
    "bitfit": [],
    "pissa": [],
    "loftq": ["--loftq-iter", "2"],
    "eva": ["--eva-rho", "1.5", "--init-records", "16"],
    "lora-ga": ["--lora-ga-gamma", "8"],
}


@pytest.mark.parametrize("word", TRAINABLE)
def test_every_method_trains_saves_and_is_read_back(lorica, stock, quick, word):
    base, data = ("bert", "classes.csv") if word == "bitfit" else ("llama", "pairs.jsonl")
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    for flag in ("--r", *(["--max-new-tokens"] if word == "bitfit" else [])):
        del flags[flag]
    words = [*(part for pair in flags.items() for part in pair), *TRAINABLE[word]]
    given = ["--model", stock / base, "--data", stock / data, "--method", word]
    done = lorica("train", *given, *words, "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    judged = lorica("eval", "run", "--data", stock / data, "--limit", "4", "--metrics", "loss")
    assert judged.code == 0, judged.err
    again = lorica("train", "--resume", "run")
    assert again.code == 0 and "is finished" in again.out


@pytest.mark.parametrize("where", ["flag", "yaml"])
def test_rows_of_tokens_train_from_flags_and_yaml(lorica, stock, quick, where):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    if where == "flag":
        given += ["--trainable-token-indices", "5,9"]
    else:
        Path("run.yaml").write_text("trainable_token_indices: {embed_tokens: [9, 5]}\n")
        given = ["run.yaml", *given]
    done = lorica("train", *given, "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    expected = [5, 9] if where == "flag" else {"embed_tokens": [5, 9]}
    assert config["trainable_token_indices"] == expected
    assert lorica("eval", "run", "--data", stock / "pairs.jsonl", "--limit", "4").code == 0
    wrong = [word if word != "5,9" else "5,100000" for word in given]
    if where == "yaml":
        wrong += ["--trainable-token-indices", "[5, 100000]"]
    refused = lorica("train", *wrong, "--output-dir", "other", "--quiet")
    assert refused.code == 2 and "there is no token 100000" in refused.err + refused.out


def test_adalora_writes_the_ranks_of_its_budget(lorica, stock, quick):
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    del flags["--r"]
    words = [part for pair in flags.items() for part in pair]
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *words]
    ranks = ["--init-r", "4", "--target-r", "1", "--tinit", "0", "--deltaT", "1"]
    own = ["--method", "adalora", *ranks]
    done = lorica("train", *given, *own, "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    (adapter,) = json.loads(Path("run/run.json").read_text())["adapters"].values()
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) == 14 and len(ranks) == adapter["num_places"], "one on average of 14 places"
    tensors = load_file("run/adapter/adapter_model.safetensors")
    assert adapter["num_parameters"] == sum(t.numel() for t in tensors.values())
    first = json.loads(Path("run/run.json").read_text())["method"]
    assert first["rank_pattern"] == adapter["method"]["rank_pattern"] and first["rank_pattern"]
    card = Path("run/adapter/README.md").read_text(encoding="utf-8")
    assert f"{adapter['num_parameters'] / 1000:.3g} K trained parameters" in card
    assert "kept_r" not in card and "kept_r" not in Path("run/config.yaml").read_text()
    merged = lorica("merge", "run", "--output-dir", "merged")
    assert merged.code == 0, merged.err


@pytest.mark.parametrize(
    ("name", "word", "more"),
    [
        ("kept_r", "adalora", {"kept_r": 3}),
        ("widths", "vera", {"widths": [3, 4]}),
        (
            "prompt_tuning_init_ids",
            "prompt-tuning",
            {"prompt_tuning_init": "text", "prompt_tuning_init_ids": [3]},
        ),
    ],
)
def test_what_is_found_out_is_no_setting(lorica, name, word, more):
    """Fields that hold what attaching or training found are in files, and are not asked for."""
    assert name not in lorica("methods", word).out
    with pytest.raises(ConfigError, match=f"{name} is not a setting"):
        resolve(("run.yaml", {**NEEDED, "method": word, **more}), methods=WORDS)
    assert getattr(build_method(METHODS[word], more), name)


def test_road_finds_a_group_size_that_fits(lorica, stock, quick):
    words = quick[: quick.index("--r")] + quick[quick.index("--r") + 2 :]
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *words]
    given += ["--method", "road", "--target-modules"]
    done = lorica("train", *given, "attention", "--output-dir", "run")
    assert done.code == 0, done.err
    assert "group_size: 36, the largest below 64 that divides all outputs" in done.out
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert config["group_size"] == 36 and config["peft_type"] == "ROAD"
    odd = lorica("train", *given, "all-linear", "--output-dir", "other")
    assert odd.code == 2
    (line,) = [line for line in odd.err.splitlines() if "up_proj" in line]
    assert "and 3 more (gate_proj, up_proj)" in line and "its 53 outputs" in line


def test_the_head_alone_says_what_to_do_where_it_is_tied(lorica, stock):
    refused = lorica(
        "train", "--model", "embedded", "--data", stock / "pairs.jsonl", "--method", "head",
        "--output-dir", "run",
    )  # fmt: skip
    assert refused.code == 2 and "method: lora with target_modules: lm_head" in refused.err


def test_a_plan_knows_the_schedule_of_adalora(lorica, stock):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--method", "adalora"]
    rest = ["--init-r", "4", "--target-r", "2", "--tinit", "100", "--tfinal", "100"]
    assert lorica("plan", *given, *rest, "--max-steps", "300").code == 0
    refused = lorica("plan", *given, *rest, "--max-steps", "150")
    assert refused.code == 2 and "leave none of the 150 steps" in refused.err

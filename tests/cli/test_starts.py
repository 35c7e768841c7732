"""Where an adapter begins, from the command line: records, another adapter, anew; several seeds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def classes(stock, quick):
    """The line of a run of a second on classes."""
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    for flag in ("--r", "--max-new-tokens"):
        del flags[flag]
    own = [part for pair in flags.items() for part in pair]
    return ["train", "--model", stock / "bert", "--data", stock / "classes.csv", *own]


def test_relevance_lies_in_the_run_folder_and_in_the_report(lorica, stock, quick):
    words = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    words += ["--method", "eva", "--init-records", "16", "--output-dir", "run"]
    done = lorica(*words)
    assert done.code == 0, done.err
    assert "ranks by variance explained" in done.out
    found = json.loads(Path("run/relevance.json").read_text())
    assert found["num_records"] == 16 and found["unit"] == "ranks"
    assert {p["layer"] for p in found["places"]} == {0, 1}
    assert sum(p["chosen"] for p in found["places"]) == 2 * len(found["places"])
    assert "Where it matters" in Path("run/report.html").read_text(encoding="utf-8")
    again = lorica(*words, "--replace", "--method", "lora")
    assert again.code == 2 and "given twice" in again.err


def test_scores_of_neurons_are_kept(lorica, stock, quick):
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    del flags["--r"]
    words = [part for pair in flags.items() for part in pair]
    done = lorica(
        "train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *words, "--method",
        "sparse", "--selection", "gradient-input", "--granularity", "row", "--density", "0.05",
        "--relevance-records", "6", "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(Path("run/relevance.json").read_text())
    scores = load_file("run/relevance.safetensors")
    assert {p["path"] for p in found["places"]} == scores.keys()
    assert scores["model.layers.0.mlp.up_proj"].shape == (53,)
    again = lorica("train", "--resume", "run")
    assert again.code == 0 and "is finished" in again.out


def test_what_needs_all_weights_and_no_records_is_chosen_as_well(lorica, stock, quick):
    """The largest weights of all layers together, not some of each by chance."""
    flags = dict(zip(quick[::2], quick[1::2], strict=True))
    del flags["--r"]
    words = [part for pair in flags.items() for part in pair]
    done = lorica(
        "train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *words, "--method",
        "sparse", "--selection", "magnitude", "--density", "0.01", "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(Path("run/relevance.json").read_text())
    weights = load_file(stock / "llama/model.safetensors")
    sizes = torch.cat([weights[f"{p['path']}.weight"].abs().flatten() for p in found["places"]])
    limit = sizes.sort(descending=True).values[round(0.01 * len(sizes)) - 1]
    for place in found["places"]:
        assert place["chosen"] == int((weights[f"{place['path']}.weight"].abs() >= limit).sum())


def test_the_same_records_and_seed_resume_to_the_same_start(lorica, stock, quick):
    words = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    words += ["--method", "lora-ga", "--output-dir", "run", "--quiet"]
    assert lorica(*words).code == 0
    first = load_file("run/adapter/adapter_model.safetensors")
    found = manifest("run")
    found["status"] = "interrupted"
    Path("run/run.json").write_text(json.dumps(found))
    again = lorica("train", "--resume", "run", "--quiet")
    assert again.code == 0, again.err
    second = load_file("run/adapter/adapter_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_few_records_with_a_trial(lorica, classes):
    words = [*classes, "--method", "few-sample", "--reinit-top-layers", "0,1"]
    done = lorica(*words, "--output-dir", "run")
    assert done.code == 0, done.err
    found = manifest("run")
    losses = found["trial"]["losses"]
    assert set(losses) == {"0", "1"}
    best = min(losses, key=lambda number: (losses[number], number))
    assert found["trial"]["best"] == int(best) == found["method"]["reinit_top_layers"]
    config = Path("run/config.yaml").read_text(encoding="utf-8")
    assert f"reinit_top_layers: {best} " in config and "# rule: the lowest eval loss of" in config
    assert "weight_decay: 0.01" in config and "# --method, method: few-sample" in config
    assert "epochs: 20" not in config, "max_steps was given"
    assert f"trial: reinit_top_layers: {best}, the lowest eval loss" in done.out
    assert lorica("train", "--resume", "run").code == 0
    none = lorica(*words, "--output-dir", "none", "--eval-size", "0")
    assert none.code == 2


def test_a_trial_needs_records_to_judge_by(lorica, stock):
    done = lorica(
        "train", "--model", stock / "bert", "--data", stock / "classes.csv", "--max-steps", "2",
        "--method", "full", "--reinit-top-layers", "0,1", "--eval-size", "0", "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 2 and "there are no records to evaluate on" in done.err
    assert not Path("run").exists()


def test_several_seeds(lorica, classes):
    words = [*classes, "--method", "head", "--seeds", "0,1,2", "--output-dir", "out", "--quiet"]
    done = lorica(*words)
    assert done.code == 0, done.err
    assert "median" in done.out and "worst" in done.out
    found = json.loads(Path("out/seeds.json").read_text())
    for metric, one in found["scores"].items():
        values = sorted(one["tuned"].values())
        assert len(values) == 3 and one["median"] == values[1]
        assert one["worst"] == (values[0] if one["higher_is_better"] else values[2]), metric
    for seed in (0, 1, 2):
        own = manifest(f"out/seed-{seed}")
        assert own["seed"] == seed and own["seeds"] == found
        assert own["data"] == manifest("out/seed-0")["data"], "other records are held out"
        assert "All seeds" in Path(f"out/seed-{seed}/report.html").read_text(encoding="utf-8")
    typical = Path(f"out/seed-{found['typical']}/report.html")
    assert Path("out/report.html").read_bytes() == typical.read_bytes()
    mean = lorica(
        "average", *(f"out/seed-{n}" for n in range(3)), "--output-dir", "mean", "--json",
        "--weights", "0.5,0.25,0.25",
    )  # fmt: skip
    assert mean.code == 0 and mean.rows[0]["weights"] == [0.5, 0.25, 0.25], mean.err
    judged = lorica("eval", "mean", "--data", classes[4], "--limit", "4")
    assert judged.code == 0, judged.err
    wrong = lorica("average", "out/seed-0", "out/seed-1", "--output-dir", "x", "--weights", "1,a")
    assert wrong.code == 2 and "no number" in wrong.err
    weights = {
        Path(f"out/seed-{seed}/adapter/adapter_model.safetensors").read_bytes() for seed in range(3)
    }
    assert len(weights) == 3
    again = lorica(*words)
    assert again.code == 2 and "add --resume out" in again.err
    on = lorica(*words, "--resume", "out")
    assert on.code == 0, on.err
    assert "seed 1" in on.out
    config = Path("out/seed-1/config.yaml").read_text(encoding="utf-8")
    assert "seeds: null" in config and "\nseed: 1" in config and "data_seed: 0" in config
    alone = lorica("train", "--resume", "out/seed-1")
    assert alone.code == 0 and "is finished" in alone.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "3"], "at least two different numbers"),
        (["--seeds", "3,3"], "at least two different numbers"),
        (["--seeds", "0,1", "--seed", "2"], "seed=2 has no effect beside seeds"),
        (["--seeds", "a,b"], "seeds"),
        (["--init-adapter", "nowhere"], "there is no folder nowhere"),
        (["--method", "full", "--reinit-top-layers", "x"], "reinit_top_layers"),
        (["--method", "full", "--reinit-top-layers", "1", "--init-adapter", "x"], "would undo"),
        (["--init-lora-weights", "pissa", "--init-adapter", "x"], "undo init_lora_weights: pissa"),
        (["--eva-rho", "3"], "eva_rho=3.0 has no effect with init_lora_weights=kaiming"),
    ],
)
def test_what_cannot_begin_is_refused(lorica, classes, words, said):
    done = lorica(*classes, *words, "--output-dir", "run")
    assert done.code == 2 and said in done.err, done.err
    assert not Path("run").exists()


def test_an_adapter_begins_from_another(lorica, stock, quick, finished_run):
    words = ["train", "--model", stock / "llama", "--data", stock / "other.jsonl", *quick]
    flags = ["--init-adapter", finished_run, "--output-dir", "run", "--eval-size", "2"]
    at = words.index("--eval-size")
    del words[at : at + 2]
    words[words.index("--learning-rate") + 1] = "1e-9"
    words[words.index("--max-steps") + 1] = "2"
    done = lorica(*words, *flags)
    assert done.code == 0, done.err
    assert "start: the tensors of" in done.out
    before = load_file(finished_run / "adapter" / "adapter_model.safetensors")
    after = load_file("run/adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    facts = json.loads(Path("run/adapter/lorica.json").read_text())
    assert facts["began_from"]["path"] == str(finished_run / "adapter")
    assert len(facts["began_from"]["digest"]) == 64
    at = words.index("--r")
    words[at + 1] = "3"
    refused = lorica(*words, *flags[:2], "--output-dir", "other", *flags[4:])
    assert refused.code == 2
    assert "its r is 2, here it is 3" in refused.err and "adapter_config.json" in refused.err


def test_ranks_and_layers_are_those_of_the_adapter_that_it_begins_from(lorica, stock, quick):
    flags = dict(zip(quick[::2], quick[1::2], strict=True)) | {"--r": "3"}
    run = ["--model", stock / "llama", "--data", stock / "pairs.jsonl"]
    words = [*run, *(word for pair in flags.items() for word in pair)]
    first = ["--lora-alpha", "5", "--target-modules", "q_proj,v_proj", "--output-dir", "first"]
    assert lorica("train", *words, *first, "--quiet").code == 0
    del flags["--r"]
    words = [*run, *(word for pair in flags.items() for word in pair)]
    planned = lorica("plan", *words, "--init-adapter", "first", "--no-probe", "--json")
    assert planned.code == 0, planned.err
    settings = {one["key"]: one for one in json.loads(planned.out)["settings"]}
    assert settings["r"]["value"] == 3 and settings["lora_alpha"]["value"] == 5
    assert settings["r"]["origin"] == "init_adapter first"
    done = lorica("train", *words, "--init-adapter", "first", "--output-dir", "second")
    assert done.code == 0, done.err
    assert "at 4 places" in done.out and "start of their own" not in done.out
    assert manifest("second")["method"]["r"] == 3
    more = ["--target-modules", "q_proj,k_proj", "--output-dir", "third"]
    done = lorica("train", *words, "--init-adapter", "first", *more)
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    assert "at 2 places" in out
    assert "layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj keep a start of" in out
    assert "not taken, since this run adapts nothing there: model.layers.0.self_attn.v_proj" in out
    none = ["--target-modules", "up_proj", "--output-dir", "fourth"]
    refused = lorica("train", *words, "--init-adapter", "first", *none)
    assert refused.code == 2 and "nothing at any of the places" in refused.err
    other = lorica("train", *words, "--init-adapter", "first", "--method", "ia3", *none)
    assert other.code == 2 and "it is lora, and this run trains ia3" in other.err


@pytest.mark.parametrize("method", ["lora", "pfeiffer"])  # in the layout of PEFT, and in ours
def test_an_adapter_of_other_classes_is_a_start_but_for_its_head(lorica, stock, classes, method):
    assert lorica(*classes, "--method", method, "--output-dir", "first", "--quiet").code == 0
    rows = (stock / "classes.csv").read_text(encoding="utf-8").splitlines()
    three = [rows[0]] + [
        f"{row.rpartition(',')[0]},{'red' if 'red' in row else 'blue' if 'blue' in row else 'no'}"
        for row in rows[1:]
    ]
    Path("three.csv").write_text("\n".join(three), encoding="utf-8")
    words = list(classes)
    words[words.index("--data") + 1] = "three.csv"
    done = lorica(*words, "--init-adapter", "first", "--output-dir", "second")
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    assert "not taken, since the base has none or another one here: classifier" in out
    assert "classifier keep a start of their own" in out
    again = lorica(*classes, "--init-adapter", "first", "--output-dir", "third")
    assert again.code == 0 and "classifier among them" in " ".join(again.out.split())
    asked = lorica("eval", "second", "--data", "three.csv", "--limit", "6")
    assert asked.code == 0, asked.err


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "eva"],
        ["--method", "lora-ga"],
        ["--method", "sparse"],
        ["--method", "sparse", "--selection", "magnitude", "--granularity", "row"],
        ["--method", "few-sample", "--seeds", "0,1"],
    ],
    ids=lambda words: "-".join(words[1::2]),
)
def test_a_plan_needs_no_records_to_choose_by(lorica, stock, words):
    done = lorica(
        "plan", "--model", stock / "bert", "--data", stock / "classes.csv", "--max-steps", "3",
        *words,
    )  # fmt: skip
    assert done.code == 0, done.err
    if words[1] == "few-sample":
        assert "one for each of 2 seeds" in done.out
        assert "a trial of reinit_top_layers trains 3 times" in done.out


def test_a_plan_refuses_a_start_that_is_none(lorica, stock):
    words = ["--model", stock / "bert", "--data", stock / "classes.csv", "--max-steps", "3"]
    done = lorica("plan", *words, "--init-adapter", "nowhere")
    assert done.code == 2 and "there is no folder nowhere" in done.err


def test_an_adapter_is_trained_on_top_of_another(lorica, stock, quick):
    words = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    at = words.index("--r")
    plain = [*words[:at], *words[at + 2 :], "--num-virtual-tokens", "3", "--method"]
    first = [*plain, "prompt-tuning"]
    assert lorica(*first, "--output-dir", "first", "--quiet").code == 0
    kept = Path("first/adapter/adapter_model.safetensors").read_bytes()
    done = lorica(*words, "--on-adapter", "first", "--output-dir", "second")
    assert done.code == 0, done.err
    assert "below: prompt-tuning of first, which stays as it is" in done.out
    assert Path("second/adapter/on/adapter_model.safetensors").read_bytes() == kept
    facts = json.loads(Path("second/adapter/lorica.json").read_text())
    assert facts["on"]["method"] == "prompt-tuning"
    below = json.loads(Path("second/adapter/on/lorica.json").read_text())
    assert below["steps"] == 4 and below["settings"]["max_steps"] == 4, "as the first run said"
    assert manifest("second")["adapters"]["default"]["on"] == ["prompt-tuning"]
    card = Path("second/adapter/README.md").read_text()
    assert "on top of another adapter (prompt-tuning)" in card and "PeftModel" not in card
    config = Path("second/config.yaml").read_text()
    assert f"on_adapter: {Path('first').absolute()}" in config
    Path("first").rename("elsewhere")
    judged = lorica("eval", "second", "--data", stock / "pairs.jsonl", "--limit", "4", "--json")
    assert judged.code == 0, judged.err
    both = judged.rows[0]["scores"]["perplexity"]
    flags = ["--data", stock / "pairs.jsonl", "--limit", "4", "--json"]
    alone = lorica("eval", "second/adapter/on", *flags)
    assert alone.code == 0, alone.err
    lower = alone.rows[0]["scores"]["perplexity"]
    assert lower["base"] == both["base"] and lower["tuned"] > both["tuned"]
    said = lorica("chat", "second", "--prompt", "cat red 4", "--max-new-tokens", "4")
    assert said.code == 0, said.err
    third = lorica(*words, "--on-adapter", "second", "--output-dir", "third")
    assert third.code == 0 and "below: prompt-tuning, then lora of second" in third.out, third.err
    assert Path("third/adapter/on/on/adapter_model.safetensors").read_bytes() == kept
    refused = lorica(*plain, "prefix-tuning", "--on-adapter", "second", "--output-dir", "no")
    assert refused.code == 2 and "virtual tokens stand before a row once" in refused.err
    for flags, text in (
        (["--on-adapter", "nowhere"], "there is no folder nowhere"),
        (["--on-adapter", "second", "--method", "eva"], "is about the bare base"),
        (["--on-adapter", stock / "llama"], "this looks like a whole model"),
        (["--on-adapter", "second", "--output-dir", "second"], "the same as on_adapter"),
    ):
        target = [] if "--output-dir" in flags else ["--output-dir", "no"]
        refused = lorica(*words, *flags, *target)
        assert refused.code == 2 and text in refused.err, refused.err
    parts = []
    for flags in ([], ["--on-adapter", "second"]):
        planned = lorica("plan", *words[1:], *flags, "--no-probe", "--json")
        assert planned.code == 0, planned.err
        parts.append(planned.rows[0]["memory"]["parts"])
    held = sum(f.stat().st_size for f in Path("second/adapter").rglob("*_model.safetensors"))
    assert 0.7 * held < parts[1]["weights"] - parts[0]["weights"] <= held, "the tensors below"
    assert parts[1]["adapter"] == parts[0]["adapter"]
    assert not Path("no").exists()


def test_a_new_head_is_trained_on_by_the_next_stage(lorica, classes):
    assert lorica(*classes, "--output-dir", "first", "--quiet").code == 0
    done = lorica(*classes, "--method", "ia3", "--on-adapter", "first", "--output-dir", "second")
    assert done.code == 0, done.err
    head = load_file("second/adapter/adapter_model.safetensors")
    assert any("classifier" in key for key in head)
    scored = lorica("eval", "second", "--data", classes[4], "--limit", "6", "--json")
    again = lorica("eval", "second", "--data", classes[4], "--limit", "6", "--json")
    assert scored.code == 0 and scored.rows == again.rows, scored.err
    kept = load_file("first/adapter/adapter_model.safetensors")
    below = load_file("second/adapter/on/adapter_model.safetensors")
    assert all(torch.equal(kept[key], below[key]) for key in kept)

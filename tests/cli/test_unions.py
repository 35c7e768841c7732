"""Several methods that train together as one adapter, from settings to files."""

import json
from pathlib import Path

import pytest
import yaml

from lorica.config import known_settings, resolve
from lorica.config.text import flag_layer
from lorica.errors import ConfigError
from lorica.methods import METHODS, UNIONS, WORDS, Bottleneck, GatedLoRA, LoRA, PrefixTuning

NEEDED = {"model": "m", "data": "d.jsonl"}


def found(**given):
    """The settings, and whether their YAML leads to the same again."""
    settings = resolve(("run.yaml", {**NEEDED, **given}), methods=WORDS)
    again = resolve(("config.yaml", yaml.safe_load(settings.to_yaml())), methods=METHODS)
    assert again.values == settings.values
    assert (again.below, again.method) == (settings.below, settings.method)
    return settings


def test_settings_go_to_the_methods_that_have_them():
    one = found(method=["prefix-tuning", "parallel"], num_virtual_tokens=5, modules_to_save=["x"])
    assert one.below == (PrefixTuning(num_virtual_tokens=5, modules_to_save=("x",)),)
    parallel = {"layout": "parallel", "adapter_scaling": 4}
    assert one.method == Bottleneck(modules_to_save=("x",), **parallel)  # type: ignore[arg-type]
    parts = ["lora", {"method": "lora", "target_modules": "mlp", "rank": 2}]
    two = found(method=parts, r=9, learning_rate=1e-3)
    assert two.below == (LoRA(r=9),) and two.method == LoRA(r=2, target_modules="mlp")
    assert two.train.learning_rate == 1e-3
    assert found(method=["lora-plus", "bitfit"]).train.loraplus_lr_ratio == 16
    line = {"--method": "prefix-tuning,parallel", "--num-virtual-tokens": "4"}
    flags = flag_layer(line, known_settings(WORDS))
    assert resolve(("a", NEEDED), flags, methods=WORDS).below == (
        PrefixTuning(num_virtual_tokens=4),
    )


def test_a_name_for_several():
    mam = found(method="mam")
    assert mam.below == (PrefixTuning(num_virtual_tokens=30),)
    assert isinstance(mam.method, Bottleneck) and mam.method.layout == "parallel"
    assert mam.method.adapter_scaling == 4 and mam.method.reduction_factor == 2
    own = found(method="mam", num_virtual_tokens=3, reduction_factor=8)
    assert own.below[0].num_virtual_tokens == 3 and own.method.reduction_factor == 8
    unipelt = found(method="unipelt", r=3, reduction_factor=8)
    assert [one.kind for one in unipelt.below] == ["gated-prefix", "gated-adapter"]
    assert unipelt.below[0].num_virtual_tokens == 10 and unipelt.below[1].reduction_factor == 8
    assert unipelt.method == GatedLoRA(r=3)
    assert set(UNIONS) <= set(WORDS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": ["lora", "loraa"]}, "run.yaml, method 2 of the list: method is 'loraa'; did"),
        ({"method": ["lora", "mam"]}, "method is 'mam', which is several: name its parts"),
        ({"method": []}, "method is a list of 0; name more"),
        ({"method": ["lora"]}, "method is a list of 1; write method: lora"),
        ({"method": ["lora", {"r": 3}]}, "method 2 of the list: a mapping without `method`"),
        ({"method": ["lora", {"method": "ia3", "r": 3}]}, "r has no effect with the method ia3"),
        (
            {"method": ["lora", "ia3"], "variant": "road_1"},
            "no effect with the method lora and ia3",
        ),
        ({"method": ["lora", "parallel"], "layout": "houlsby"}, "layout=houlsby contradicts"),
        ({"method": ["lora", "parallel"], "r": 0}, "run.yaml: r is 0"),
        ({"method": {"kind": "lora"}}, "method is a section here"),
    ],
)
def test_what_makes_no_union_is_told_with_its_place(given, said):
    with pytest.raises(ConfigError) as error:
        found(**given)
    assert said in str(error.value)


def test_mam_trains_is_planned_saved_and_goes_on(lorica, stock, quick):
    words = quick[: quick.index("--r")] + quick[quick.index("--r") + 2 :]
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *words]
    given += ["--method", "mam", "--num-virtual-tokens", "3"]
    done = lorica("train", *given, "--output-dir", "run")
    assert done.code == 0, done.err
    assert "adapter: prefix-tuning with bottleneck, " in done.out
    assert "3 virtual tokens in front of" in done.out
    run = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    (own,) = run["adapters"].values()
    assert own["on"] == ["prefix-tuning"] and own["together"][0]["num_virtual_tokens"] == 3
    assert not own["merges"] and run["plan"]["memory"]["total"] > 0
    card = Path("run/adapter/README.md").read_text(encoding="utf-8")
    assert "An adapter (prefix-tuning with bottleneck)" in card and "PeftModel" not in card
    assert "It was trained together with another adapter (prefix-tuning)" in card
    assert "| `prefix-tuning: num_virtual_tokens` | 3 |" in card
    facts = json.loads(Path("run/adapter/lorica.json").read_text(encoding="utf-8"))
    assert facts["on"]["together"] is True
    judged = lorica("eval", "run", "--data", stock / "pairs.jsonl", "--limit", "4", "--json")
    assert judged.code == 0, judged.err
    planned = lorica("plan", *given, "--no-probe", "--json").rows[0]
    assert planned["memory"]["parts"]["adapter"] == 2 * 4 * own["num_parameters"]
    whole = Path("run/adapter/adapter_model.safetensors").read_bytes()
    run["status"] = "interrupted"
    Path("run/run.json").write_text(json.dumps(run), encoding="utf-8")
    Path("run/adapter/adapter_model.safetensors").write_bytes(b"")
    again = lorica("train", "--resume", "run")
    assert again.code == 0, again.err
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == whole
    shown = lorica("methods", "mam")
    assert "the same as method: [prefix-tuning, parallel], which train together" in shown.out
    assert "num_virtual_tokens: 30" in shown.out and "layout: parallel" in shown.out


def test_a_new_head_trains_with_a_union(lorica, stock):
    given = ["--model", stock / "bert", "--data", stock / "classes.csv", "--max-steps", "2"]
    given += ["--method", "lora,bitfit", "--eval-records", "4"]
    done = lorica("train", *given, "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    (own,) = json.loads(Path("run/run.json").read_text())["adapters"].values()
    assert own["method"]["modules_to_save"] == ["classifier"]
    scored = lorica("eval", "run", "--data", stock / "classes.csv", "--limit", "6")
    assert scored.code == 0, scored.err


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lora,adalora", "adalora acts between the steps"),
        ("eva,ia3", "a start that records decide is that of one method"),
        ("prefix-tuning,prompt-tuning", "virtual tokens stand before a row once"),
    ],
)
def test_what_cannot_train_together_is_refused_by_run_and_plan(lorica, stock, method, said):
    given = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--method", method]
    planned, trained = lorica("plan", *given), lorica("train", *given, "--output-dir", "run")
    assert planned.code == trained.code == 2
    assert said in planned.err and said in trained.err and not Path("run").exists()

"""The mean of adapters: its tensors, what it keeps beside them, and what has no mean."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorica
from architectures import ARCHITECTURES
from lorica.errors import AdapterFileError, ConfigError, LoricaWarning
from lorica.files.average import average
from lorica.methods import IA3, LISA, AdaLoRA, Bottleneck, LoRA, PromptTuning, PTuning, Sparse, VeRA

BOTH = ("q_proj", "up_proj")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
]


def made(folder, method, seed, name="llama"):
    model = ARCHITECTURES[name].build()
    adapter = lorica.attach(model, method, name="a")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 10
    lorica.save_adapter(adapter, folder, provenance={"task": {"kind": "causal-lm"}})
    return folder


@pytest.mark.parametrize(
    ("method", "warns"),
    [
        (LoRA(r=3, target_modules=BOTH), True),
        (Bottleneck(reduction_factor=6), True),
        (IA3(), False),
        (VeRA(r=8, target_modules=BOTH), False),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_factors_that_began_apart_are_told(method, warns, tmp_path):
    for seed in (1, 2):
        model = ARCHITECTURES["llama"].build()
        lorica.save_adapter(lorica.attach(model, method, name="a", seed=seed), tmp_path / str(seed))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        average([tmp_path / "1", tmp_path / "2"], tmp_path / "mean")
    said = [str(one.message) for one in told if issubclass(one.category, LoricaWarning)]
    assert bool(said) is warns
    if warns:
        assert "began apart" in said[0] and "init_adapter" in said[0]
        assert "lorica.activate(" in said[0]


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=3, target_modules=BOTH, modules_to_save=("norm",)),
        VeRA(r=8, target_modules=BOTH),
        IA3(),
        Sparse(selection="random", density=0.1, target_modules=BOTH),
    ],
    ids=lambda method: method.kind,
)
def test_every_tensor_is_the_weighted_mean(method, tmp_path):
    one, two = made(tmp_path / "1", method, 1), made(tmp_path / "2", method, 2)
    found = average([one, two], tmp_path / "mean", weights=[0.3, 0.7])
    tensors = [load_file(f / "adapter_model.safetensors") for f in (one, two, found)]
    assert tensors[0].keys() == tensors[2].keys()
    for key, mean in tensors[2].items():
        if not mean.is_floating_point():
            assert torch.equal(mean, tensors[0][key])
            continue
        wanted = 0.3 * tensors[0][key].double() + 0.7 * tensors[1][key].double()
        torch.testing.assert_close(mean, wanted.to(mean.dtype))
    model = ARCHITECTURES["llama"].build()
    adapter = lorica.load_adapter(model, found, name="a")
    assert adapter.method.kind == method.kind and adapter.reason == "the mean of 2 adapters"
    facts = json.loads((found / "lorica.json").read_text())
    assert [s["weight"] for s in facts["average_of"]] == [0.3, 0.7]
    assert facts["task"] == {"kind": "causal-lm"}
    same = average([one, one], tmp_path / "same")
    own = (one / "adapter_model.safetensors").read_bytes()
    assert (same / "adapter_model.safetensors").read_bytes() == own


def test_peft_reads_a_mean_of_adapters(tmp_path):
    method = LoRA(r=3, target_modules=BOTH)
    folders = [made(tmp_path / str(i), method, i) for i in range(3)]
    found = average(folders, tmp_path / "mean")
    arch = ARCHITECTURES["llama"]
    base = arch.build()
    back = peft.PeftModel.from_pretrained(base, str(found)).eval()
    model = arch.build()
    lorica.load_adapter(model, found, name="a")
    lorica.activate(model, "a")
    with torch.no_grad():
        wanted = arch.logits(back(**arch.sample(base, 2, 7)))
        torch.testing.assert_close(arch.logits(model(**arch.sample(model, 2, 7))), wanted)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (VeRA(r=8, target_modules=BOTH), "is vera, and"),
        (LoRA(r=4, target_modules=BOTH), "r is 4 in"),
        (LoRA(r=3, lora_alpha=5, target_modules=BOTH), "lora_alpha is 5 in"),
        (LoRA(r=3, target_modules=("q_proj",)), "target_modules is ['q_proj'] in"),
    ],
)
def test_what_differs_has_no_mean(method, said, tmp_path):
    one = made(tmp_path / "1", LoRA(r=3, target_modules=BOTH), 1)
    two = made(tmp_path / "2", method, 2)
    with pytest.raises(AdapterFileError) as error:
        average([one, two], tmp_path / "mean")
    assert said in str(error.value) and "activate them together" in str(error.value)
    assert not (tmp_path / "mean").exists()


def test_other_entries_bases_and_tasks_are_told(tmp_path):
    sparse = Sparse(selection="random", density=0.1, target_modules=BOTH)
    one = made(tmp_path / "1", sparse, 1)
    two = made(tmp_path / "2", sparse, 2)
    facts = json.loads((two / "lorica.json").read_text())
    facts["task"] = {"kind": "seq2seq"}
    facts["base"] = {"digest": "b" * 64}
    (two / "lorica.json").write_text(json.dumps(facts))
    other = json.loads((one / "lorica.json").read_text())
    (one / "lorica.json").write_text(json.dumps({**other, "base": {"digest": "a" * 64}}))
    with pytest.raises(AdapterFileError) as error:
        average([one, two], tmp_path / "mean")
    assert "digest of the base differs" in str(error.value)
    assert "how the base is asked (task) differs" in str(error.value)
    model = ARCHITECTURES["llama"].build()
    lorica.save_adapter(lorica.attach(model, sparse, seed=5), tmp_path / "3")
    (one / "lorica.json").unlink()
    with pytest.raises(AdapterFileError, match="counts places, and differs"):
        average([one, tmp_path / "3"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [([1.0], "1 weights for 2"), ([0.5, 0.6], "sum to 1.1"), ([float("nan"), 1.0], "no finite")],
)
def test_weights_that_are_no_shares_are_refused(weights, said, tmp_path):
    one = made(tmp_path / "1", LoRA(r=2, target_modules=BOTH), 1)
    with pytest.raises(ConfigError) as error:
        average([one, one], tmp_path / "mean", weights=weights)
    assert said in str(error.value)
    with pytest.raises(ConfigError, match="at least two adapters"):
        average([one], tmp_path / "mean")


def test_an_adapter_that_is_there_is_spared(tmp_path):
    one = made(tmp_path / "1", LoRA(r=2, target_modules=BOTH), 1)
    before = (one / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterFileError):
        average([one, one], one)
    assert (one / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(AdapterFileError, match="there is no folder"):
        average([one, Path("nowhere")], tmp_path / "mean")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PromptTuning(prompt_tuning_init="random"), PromptTuning()),
        (PTuning(encoder_hidden_size=5), PTuning()),
        (AdaLoRA(init_r=3, target_r=2), AdaLoRA(init_r=3, target_r=1, orth_reg_weight=0.1)),
        (LISA(parameters="norm"), LISA(parameters="norm", lisa_interval_steps=3)),
    ],
    ids=lambda method: method.kind,
)
@pytest.mark.filterwarnings("ignore:.*began apart:lorica.errors.LoricaWarning")  # so much noise
def test_how_an_adapter_was_trained_may_differ(one, other, tmp_path):
    folders = [made(tmp_path / str(i), method, i) for i, method in enumerate((one, other))]
    average(folders, tmp_path / "mean")
    found, *parts = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "mean", *folders)
    )
    assert found
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, (parts[0][key] + parts[1][key]) / 2)

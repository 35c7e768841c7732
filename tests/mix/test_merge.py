"""Merged equals attached; the rounding is measured, told, and refused where it destroys the
adapter.
"""

import pytest
import torch
import transformers as hf
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.attach.site import is_site
from lorica.base.known import Base, base_of
from lorica.errors import ConfigError, LoricaWarning, MergeError
from lorica.files.whole import save_merged
from lorica.methods.lora import LoRA
from lorica.mix import MergeReport, merge


def stirred(model: nn.Module, method: LoRA, name: str = "a", size: float = 0.05):
    adapter = attach(model, method, name=name)
    generator = torch.Generator().manual_seed(len(name) + 7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


def answer(name: str, model: nn.Module) -> torch.Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(model, 2, 7)))


def check_merge(name: str, model: nn.Module, mixture, tolerance: float = 1e-5) -> MergeReport:
    """Merging changes the answer of the attached model by no more than the rounding."""
    with activate(model, None):
        bare = answer(name, model)
    with activate(model, mixture):
        attached = answer(name, model)
    size = max(1.0, attached.abs().max().item())
    assert (attached - bare).abs().max() > 20 * tolerance
    report = merge(model, mixture)
    assert (answer(name, model) - attached).abs().max() <= tolerance * size
    assert not adapters(model) and not any(is_site(m) for m in model.modules())
    return report


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_equals_attached(name):
    model = ARCHITECTURES[name].build()
    stirred(model, LoRA(r=3, lora_alpha=5, target_modules="all-linear"))
    report = check_merge(name, model, "a")
    assert report.damage < 1e-4 and all(w.changed > 0.5 for w in report.merged)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "cnn", "attention-net", "bart"])
def test_a_mixture_is_merged_as_its_exact_sum(name):
    model = ARCHITECTURES[name].build()
    stirred(model, LoRA(r=3, lora_alpha=5, target_modules="all-linear"))
    stirred(model, LoRA(r=2, lora_alpha=1, target_modules="all-linear", use_rslora=True), "bb")
    report = check_merge(name, model, {"a": 0.7, "bb": -1.5})
    assert dict(report.weights) == {"a": 0.7, "bb": -1.5}


CASES = {
    "embedding": ("qwen3", LoRA(r=4, target_modules=("embed_tokens", "lm_head"))),
    "scaled embedding": ("gemma", LoRA(r=4, target_modules=("embed_tokens", "q_proj"))),
    "convolutions": ("cnn", LoRA(r=3, target_modules=("conv1", "conv2", "embedding"))),
    "whole head": ("bert", LoRA(r=2, target_modules="attention", modules_to_save=("classifier",))),
    "whole norm": ("llama", LoRA(r=2, target_modules="mlp", modules_to_save=("input_layernorm",))),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer(case):
    name, method = CASES[case]
    model = ARCHITECTURES[name].build()
    stirred(model, method, size=0.2)
    check_merge(name, model, "a")


def test_copies_replace_the_parameters_bit_for_bit():
    model = ARCHITECTURES["bert"].build()
    adapter = stirred(model, LoRA(r=2, target_modules="attention", modules_to_save=("classifier",)))
    copies = {key: t.detach().clone() for key, t in adapter.slots["classifier"].tensors.items()}
    merge(model, adapter)
    assert torch.equal(model.classifier.weight, copies["weight"])
    assert torch.equal(model.classifier.bias, copies["bias"])


def test_in_float64_nothing_is_lost():
    model = ARCHITECTURES["llama"].build().double()
    stirred(model, LoRA(r=3, target_modules="all-linear"))
    report = check_merge("llama", model, "a", tolerance=1e-12)
    assert report.damage < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_and_its_damage(dtype):
    """The stored weight is the float32 sum rounded once, and the report says what an independent
    sum says.
    """
    model = ARCHITECTURES["llama"].build().to(dtype)
    adapter = stirred(model, LoRA(r=3, lora_alpha=5, target_modules=("q_proj",)))
    other = stirred(model, LoRA(r=2, lora_alpha=3, target_modules=("q_proj",)), "bb")
    path = "model.layers.1.self_attn.q_proj"
    before = model.get_submodule(path).weight.detach().clone()
    with torch.no_grad():
        parts = [slot.tensors for slot in (adapter.slots[path], other.slots[path])]
        update = 0.5 * 5 / 3 * (parts[0]["B"] @ parts[0]["A"]) + 1.5 * (
            parts[1]["B"] @ parts[1]["A"]
        )
    report = merge(model, {"a": 0.5, "bb": 1.0})
    exact = (before.float() + update).to(dtype)
    stored = model.get_submodule(path).weight
    assert stored.dtype == dtype
    # the sums may differ in the last bit of float32, which moves a rounding here and there
    assert (stored != exact).float().mean() < 0.01
    entry = next(w for w in report.merged if w.path == f"{path}.weight")
    lost = (exact.double() - before.double() - update.double()).square().mean().sqrt()
    size = update.double().square().mean().sqrt()
    assert entry.damage == pytest.approx(float(lost / size), rel=0.02)
    assert entry.update == pytest.approx(float(size), rel=1e-5)
    assert entry.changed == pytest.approx(float((exact != before).double().mean()), abs=0.01)
    assert entry.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_answers_as_before(dtype, tolerance):
    model = ARCHITECTURES["llama"].build().to(dtype)
    stirred(model, LoRA(r=3, target_modules="all-linear"), size=0.1)
    check_merge("llama", model, "a", tolerance=tolerance)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor], name: str = "a") -> bool:
    same = all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    return same and name in adapters(model)


def test_damage_is_warned_of_and_refused():
    def prepared(size: float) -> nn.Module:
        model = ARCHITECTURES["llama"].build().bfloat16()
        stirred(model, LoRA(r=4, lora_alpha=4, target_modules="all-linear"), size=size)
        return model

    model = prepared(0.008)
    with pytest.warns(
        LoricaWarning, match=r"rounding destroyed [0-9.]+% of the update; worst: model"
    ):
        report = merge(model, "a")
    assert 0.05 < report.damage < 0.25
    model = prepared(0.001)
    before = state(model)
    with pytest.raises(MergeError, match="rounding would destroy") as caught:
        merge(model, "a")
    assert "force=True" in (caught.value.mend or "") and len(caught.value.problems) == 5
    assert unchanged(model, before)
    with pytest.warns(LoricaWarning, match="rounding destroyed"):
        report = merge(model, "a", force=True)
    assert report.damage > 0.25 and not adapters(model)


def test_an_update_of_zero_has_no_damage():
    model = ARCHITECTURES["llama"].build().bfloat16()
    before = state(model)
    attach(model, LoRA(target_modules="q_proj"), name="a")
    report = merge(model, "a")
    assert report.damage == 0 and {w.changed for w in report.merged} == {0.0}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_report_reads_well():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(target_modules="q_proj"))
    lines = str(merge(model, {"a": 0.5})).splitlines()
    assert lines[0].startswith("merged a x 0.5 into 2 weights; rounding damage 0.0")
    assert "model.layers.0.self_attn.q_proj.weight" in lines[2] and len(lines) == 4


@pytest.mark.parametrize(
    "mixture", [{}, "b", {"a": float("nan")}, {"a": True}, {"a": "1"}, {"a": 1, "b": 1}]
)
def test_mixtures_that_are_none(mixture):
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(target_modules="q_proj"))
    before = state(model)
    with pytest.raises(ConfigError):
        merge(model, mixture)
    assert unchanged(model, before)


def test_others_stay_attached_and_the_base_is_known_as_another_one():
    model = ARCHITECTURES["llama"].build()
    model.__dict__["_lorica_base"] = Base("org/x", "causal-lm", "d" * 64)
    stirred(model, LoRA(target_modules="q_proj"))
    stirred(model, LoRA(target_modules="v_proj"), "bb")
    merge(model, "a")
    assert list(adapters(model)) == ["bb"]
    base = base_of(model)
    assert base is not None and base.name == "org/x + a" and base.digest == ""


# --- what cannot be merged ------------------------------------------------------------------------


def refused(model: nn.Module, mixture, match: str) -> None:
    before = state(model)
    with pytest.raises(MergeError) as caught:
        merge(model, mixture)
    assert match in str(caught.value)
    assert unchanged(model, before)


def test_a_grouped_convolution():
    model = ARCHITECTURES["cnn"].build()
    stirred(model, LoRA(r=3, target_modules=("conv3", "fc1")))
    refused(model, "a", "grouped convolution")


def test_results_that_are_not_finite():
    model = ARCHITECTURES["llama"].build().half()
    stirred(model, LoRA(r=2, lora_alpha=9000, target_modules="q_proj"), size=5.0)
    refused(model, {"a": 1e4}, "not be finite")


def test_an_embedding_that_writes_itself():
    model = nn.Sequential(nn.Embedding(11, 5, max_norm=1.0))
    stirred(model, LoRA(r=2, target_modules="0"))
    refused(model, "a", "max_norm")


def test_a_weighted_norm_is_no_norm():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(target_modules="q_proj", modules_to_save=("input_layernorm",)))
    refused(model, {"a": 0.5}, "give one adapter the weight 1")


def test_one_parameter_of_two_modules():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = Shared()
    stirred(model, LoRA(r=2, target_modules="first"))
    refused(model, "a", "first.weight: its weight is also that of second.weight")


def test_two_parameters_over_the_same_memory():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = nn.Parameter(model["one"].weight.data)
    stirred(model, LoRA(r=2, target_modules="one"))
    refused(model, "a", "memory is shared")


@pytest.mark.parametrize(
    "name, target", [("t5", "lm_head"), ("bart", "embed_tokens"), ("bart", "lm_head")]
)
def test_the_ties_of_encoder_decoders(name, target):
    model = ARCHITECTURES[name].build()
    assert model.config.tie_word_embeddings
    stirred(model, LoRA(r=2, target_modules=(target, "k" if name == "t5" else "k_proj")))
    refused(model, "a", "its weight is also that of")


def test_a_module_used_twice_is_merged_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x).tanh())

    model, x = Twice(), torch.randn(3, 6)
    stirred(model, LoRA(r=2, target_modules="first"), size=0.5)
    with activate(model, "a"):
        attached = model(x)
    assert len(merge(model, "a").merged) == 1
    torch.testing.assert_close(model(x), attached)


# --- ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_tied_ends_are_untied_in_memory_and_on_the_disk(target, tmp_path):
    model = ARCHITECTURES["llama-tied"].build()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stirred(model, LoRA(r=3, target_modules=(*target, "q_proj")), size=0.2)
    report = check_merge("llama-tied", model, "a")
    assert len(report.untied) == len(target)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert all(p.requires_grad for p in model.parameters())
    expected = answer("llama-tied", model)
    save_merged(model, tmp_path / "x")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert torch.equal(answer("llama-tied", again.eval()), expected)


def test_ties_without_an_adapter_stay(tmp_path):
    model = ARCHITECTURES["llama-tied"].build()
    stirred(model, LoRA(r=3, target_modules="q_proj"))
    assert not check_merge("llama-tied", model, "a").untied
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    )


def test_what_the_config_tied_besides_is_written_too(tmp_path):
    """A masked language model ties the bias of its head by the same switch."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=97,
        hidden_size=36,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=41,
        tie_word_embeddings=True,
    )
    model = hf.BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    stirred(model, LoRA(r=3, target_modules=("word_embeddings", "query")), size=0.3)
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with activate(model, "a"):
            attached = model(ids).logits
        assert merge(model, "a").untied
        torch.testing.assert_close(model(ids).logits, attached, atol=1e-5, rtol=1e-5)
        save_merged(model, tmp_path / "x")
        again = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "x").eval()
        torch.testing.assert_close(again(ids).logits, attached, atol=1e-5, rtol=1e-5)

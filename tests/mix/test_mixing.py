"""An adapter made of others does what they do together; what is lost is told, and refused where
there is no sum.
"""

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.errors import ConfigError, LoricaWarning, MergeError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import METHODS, AdaLoRA, DoRA, LoHa, LoRA
from lorica.methods.method import Method
from lorica.mix import mix


def stirred(model: nn.Module, method: Method, name: str, size: float = 0.1):
    adapter = attach(model, method, name=name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


def pair(name: str = "llama", targets="all-linear") -> nn.Module:
    """Two adapters of other ranks, scales and (where targets say so) places."""
    model = ARCHITECTURES[name].build()
    stirred(model, LoRA(r=3, lora_alpha=5, target_modules=targets), "a")
    stirred(model, LoRA(r=2, lora_alpha=1, use_rslora=True, target_modules=targets), "b")
    return model


def answer(name: str, model: nn.Module, mixture) -> torch.Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad(), activate(model, mixture):
        return arch.logits(model(**arch.sample(model, 2, 7)))


def same(name: str, model: nn.Module, mixture, other, tolerance: float = 1e-5) -> None:
    wanted, bare = answer(name, model, mixture), answer(name, model, None)
    size = max(1.0, wanted.abs().max().item())
    assert (wanted - bare).abs().max() > 20 * tolerance
    assert (answer(name, model, other) - wanted).abs().max() <= tolerance * size


PLACES = {"cnn": ("conv1", "conv2", "embedding", "fc1"), "qwen3": ("embed_tokens", "q_proj")}


@pytest.mark.filterwarnings("ignore:PEFT's layout cannot name")
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mixtral", "bart", "attention-net", "cnn", "qwen3"]
)
def test_cat_is_exact(name, tmp_path):
    """In memory, and read again from its files."""
    model = pair(name, PLACES.get(name, "all-linear"))
    mixture = {"a": 0.7, "b": -1.3}
    report = mix(model, mixture, name="ab")
    assert report.error < 1e-9 and {place.rank for place in report.places} == {5}
    same(name, model, mixture, "ab")
    save_adapter(report.adapter, tmp_path / "ab")
    load_adapter(model, tmp_path / "ab", name="again")
    same(name, model, mixture, "again")


@pytest.mark.parametrize("name", ["llama", "mixtral", "cnn"])
def test_svd_of_the_full_rank_is_exact_and_the_error_of_a_smaller_one_is_true(name):
    model = pair(name, PLACES.get(name, "all-linear"))
    mixture = {"a": 0.7, "b": 0.3}
    report = mix(model, mixture, name="full", method="svd")
    assert report.error < 1e-6
    same(name, model, mixture, "full")
    small = mix(model, mixture, name="small", method="svd", r=2)
    assert 0.01 < small.error == pytest.approx(small.lost, rel=1e-6)
    known = adapters(model)
    wanted, made = 0.0, 0.0
    for place in small.places:
        layers = [(w, known[n].slots[place.path]) for n, w in mixture.items()]
        plates = dict(model.named_modules()).get(place.path)
        layer = plates.__dict__["_lorica"].layer if plates is not None else None
        if layer is None:
            continue
        sums = [w * slot.method.delta(slot.tensors, layer).double() for w, slot in layers]
        exact = torch.stack(sums).sum(0).detach()
        slot = small.adapter.slots[place.path]
        off = slot.method.delta(slot.tensors, layer).double().detach() - exact
        assert place.error == pytest.approx(float(off.norm() / exact.norm()), rel=1e-4)
        wanted, made = wanted + float(exact.square().sum()), made + float(off.square().sum())
    if name != "mixtral":  # whose experts are no modules
        assert small.error == pytest.approx((made / wanted) ** 0.5, rel=1e-4)


def test_adapters_of_different_places():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(r=3, target_modules=("q_proj", "v_proj")), "a")
    stirred(model, LoRA(r=2, target_modules=("v_proj", "up_proj")), "b")
    report = mix(model, {"a": 0.7, "b": 2.0}, name="ab")
    ranks = {place.path.rpartition(".")[2]: place.rank for place in report.places}
    assert ranks == {"q_proj": 3, "v_proj": 5, "up_proj": 2}
    same("llama", model, {"a": 0.7, "b": 2.0}, "ab")


OTHERS = {
    "dora": DoRA(r=2, target_modules="attention"),
    "adalora": AdaLoRA(init_r=4, target_r=4, target_modules="attention"),
    "pissa": LoRA(r=2, init_lora_weights="pissa", target_modules="attention"),
    "loha": LoHa(r=2, target_modules="attention"),
    "lokr": METHODS["lokr"](r=2, target_modules="attention"),
    "vera": METHODS["vera"](target_modules="attention"),
    "hira": METHODS["hira"](r=2, target_modules="attention"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_method_that_becomes_a_weight_takes_part(kind):
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(r=3, target_modules="all-linear"), "a")
    stirred(model, OTHERS[kind], "other")
    mixture = {"a": 0.5, "other": 1.5}
    report = mix(model, mixture, name="ab", method="svd", r=36)
    assert report.error < 1e-5
    same("llama", model, mixture, "ab", tolerance=3e-5)
    alone = mix(model, {"other": 1.0}, name="lora", method="svd", r=3)
    assert 0 < alone.error < 1 and all(p.rank == 3 for p in alone.places)
    if kind in ("loha", "dora", "lokr", "hira"):
        with pytest.raises(MergeError, match="no product of thin factors: give r"):
            mix(model, mixture, name="cat")


def test_new_heads_are_mixed_too():
    model = ARCHITECTURES["bert"].build()
    head = {"target_modules": "attention", "modules_to_save": ("classifier",)}
    stirred(model, LoRA(r=2, **head), "a")
    stirred(model, LoRA(r=3, **head), "b")
    mix(model, {"a": 0.7, "b": 0.3}, name="ab")
    same("bert", model, {"a": 0.7, "b": 0.3}, "ab")
    mix(model, {"a": 0.7, "b": 0.8}, name="more")
    same("bert", model, {"a": 0.7, "b": 0.8}, "more")


def test_linear_warns_with_its_error():
    model = ARCHITECTURES["llama"].build()
    for name in ("a", "b"):
        stirred(model, LoRA(r=2, target_modules="all-linear"), name, size=0.5)
    with pytest.warns(LoricaWarning, match=r"of the result is not the weighted sum; choose cat"):
        report = mix(model, {"a": 0.5, "b": 0.5}, name="ab", method="linear")
    assert report.error > 0.3


def test_slerp_is_the_great_circle():
    model = pair()
    report = mix(model, {"a": 0.25, "b": 0.75}, name="ab", method="slerp")
    for place in report.places:
        layer = model.get_submodule(place.path).__dict__["_lorica"].layer

        def delta(name: str, path: str = place.path, layer=layer) -> torch.Tensor:
            slot = adapters(model)[name].slots[path]
            return slot.method.delta(slot.tensors, layer).double().flatten().detach()

        one, two, made = delta("a"), delta("b"), delta("ab")
        angle = torch.acos(one @ two / one.norm() / two.norm())
        wanted = (torch.sin(0.25 * angle) * one + torch.sin(0.75 * angle) * two) / angle.sin()
        torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-4)


def test_what_dare_drops_depends_on_the_seed_alone():
    model = pair()
    torch.manual_seed(1)
    how = {"method": "dare_ties", "density": 0.5, "r": 4}
    one = mix(model, {"a": 0.5, "b": 0.5}, name="one", seed=3, **how)
    torch.manual_seed(2)
    two = mix(model, {"a": 0.5, "b": 0.5}, name="two", seed=3, **how)
    other = mix(model, {"a": 0.5, "b": 0.5}, name="other", seed=4, **how)
    path = one.places[0].path
    tensors = [r.adapter.slots[path].tensors["A"] for r in (one, two, other)]
    assert torch.equal(tensors[0], tensors[1]) and not torch.equal(tensors[0], tensors[2])
    assert one.facts()["seed"] == 3


REFUSED = {
    "unknown way": ({"method": "tie"}, "did you mean ties"),
    "no density": ({"method": "ties"}, "needs a density"),
    "vain density": ({"method": "cat", "density": 0.5}, "density has no effect on cat"),
    "vain rank": ({"method": "cat", "r": 2}, "svd cuts the same sum"),
    "density of 2": ({"method": "ties", "density": 2.0}, "at most 1"),
    "vain sign": ({"method": "svd", "majority_sign_method": "frequency"}, "has no effect"),
    "slerp beyond": ({"method": "slerp"}, "two weights with the sum 1"),
    "linear": ({"method": "linear"}, "of one rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case):
    how, match = REFUSED[case]
    model = pair()
    with pytest.raises(ConfigError) as caught:
        mix(model, {"a": 0.7, "b": 0.7}, name="ab", **how)
    assert match in str(caught.value)
    assert list(adapters(model)) == ["a", "b"]


def test_adapters_that_are_refused():
    model = ARCHITECTURES["llama"].build()
    stirred(model, LoRA(r=2, target_modules="all-linear"), "a")
    stirred(model, METHODS["bottleneck"](), "b")
    with pytest.raises(MergeError, match="is no change of a weight"):
        mix(model, {"a": 0.5, "b": 0.5})
    for mixture in ({}, {"a": float("nan")}, {"nobody": 1.0}):
        with pytest.raises(ConfigError):
            mix(model, mixture)


def test_the_report_reads_well():
    text = str(mix(pair(), {"a": 0.7, "b": 0.3}, method="svd", r=2))
    assert text.startswith("svd of a x 0.7, b x 0.3: 14 places, rank 2; ")
    assert "away from the exact weighted sum" in text and "lost by the rank" in text

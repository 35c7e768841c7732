"""Selections of the base's own parameters: which they are, that they train alone, and merge."""

import pytest
import torch
from torch import nn

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.errors import TargetError
from lorica.methods import Selective


def chosen(name: str, **settings) -> set[str]:
    adapter = lorica.attach(ARCHITECTURES[name].build(), Selective(**settings))
    return {path for path, _ in adapter.named_parameters()}


def test_biases_alone():
    model = ARCHITECTURES["bert"].build()
    wanted = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert chosen("bert", parameters="bias") == wanted
    with pytest.raises(TargetError, match="no module has parameters of the kind 'bias'"):
        chosen("llama", parameters="bias")


def test_a_new_head_trains_whole_beside_them():
    found = chosen("bert", parameters="bias", modules_to_save=("classifier",))
    assert {"classifier.weight", "classifier.bias"} <= found
    assert {p for p in found if p.endswith("weight")} == {"classifier.weight"}


def test_norms_alone():
    found = chosen("llama", parameters="norm")
    assert found and all("norm" in path for path in found)
    assert len(found) == 5  # two in each of two layers, and the last


def test_all_and_what_is_tied_stays():
    model = ARCHITECTURES["gpt2"].build()
    assert model.lm_head.weight is model.transformer.wte.weight
    adapter = lorica.attach(model, Selective())
    names = {path for path, _ in adapter.named_parameters()}
    every = {name for name, _ in model.named_parameters()}
    assert every - names == {"transformer.wte.weight"} and "stay frozen" in adapter.reason
    assert chosen("bert") == {name for name, _ in ARCHITECTURES["bert"].build().named_parameters()}


def test_the_last_layers_and_what_follows():
    found = chosen("llama", last_layers=1)
    assert all(p.startswith(("model.layers.1.", "model.norm", "lm_head")) for p in found)
    assert {"model.norm.weight", "lm_head.weight"} <= found
    assert chosen("llama", layers_to_transform=(1,)) == {p for p in found if ".layers." in p}
    with pytest.raises(TargetError, match=r"last_layers=9, but model\.layers has 2"):
        chosen("llama", last_layers=9)
    with pytest.raises(TargetError, match="there is no layer 7"):
        chosen("llama", layers_to_transform=(7,))


def test_names_take_what_they_hold_and_typos_are_told():
    found = chosen("llama", target_modules=("self_attn", "lm_head"), exclude_modules=("q_proj",))
    assert any(".k_proj." in p for p in found) and not any(".q_proj." in p for p in found)
    assert all("self_attn" in p or p == "lm_head.weight" for p in found)
    with pytest.raises(TargetError, match="'lm_heat' matches nothing; did you mean 'lm_head'"):
        chosen("llama", target_modules=("lm_heat",))


def test_settings_out_of_range_are_refused_at_once():
    with pytest.raises(lorica.LoricaError) as error:
        Selective(parameters="biases", last_layers=0, layers_to_transform=(0,))
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("parameters", ["all", "bias", "norm"])
def test_they_start_as_the_base_train_alone_merge_and_come_back(parameters, tmp_path):
    arch = ARCHITECTURES["bert"]
    model = arch.build()
    given = arch.sample(model, 2, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        base = arch.logits(model(**given))
    adapter = lorica.attach(model, Selective(parameters=parameters), name="a")
    with activate(model, "a"):
        start = arch.logits(model(**given))
        start.square().sum().backward()
    assert torch.equal(start, base)
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.01
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad(), activate(model, "a"):
        tuned = arch.logits(model(**given))
    assert not torch.equal(tuned, base)
    lorica.save_adapter(adapter, tmp_path / "a")
    again = arch.build()
    lorica.load_adapter(again, tmp_path / "a", name="a")
    with torch.no_grad(), activate(again, "a"):
        assert torch.equal(arch.logits(again(**given)), tuned)
    lorica.merge(model, "a")
    with torch.no_grad():
        assert torch.equal(arch.logits(model(**given)), tuned)
    assert all(isinstance(module, nn.Module) for module in model.modules())

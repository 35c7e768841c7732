"""Layers that begin anew: in the adapter alone, as the model's class draws them; and the head."""

import copy

import pytest
import torch
from torch import nn

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.errors import ConfigError, TargetError
from lorica.methods import Selective


def logits(name, model, mixture):
    arch = ARCHITECTURES[name]
    with torch.no_grad(), activate(model, mixture):
        return arch.logits(model(**arch.sample(model, 2, 7)))


@pytest.mark.parametrize("name", ["bert", "llama", "gemma", "t5", "distilbert"])
def test_the_last_layers_begin_anew_and_the_base_stays(name):
    model = ARCHITECTURES[name].build()
    before, expected = copy.deepcopy(model.state_dict()), logits(name, model, None)
    lorica.attach(model, Selective(reinit_top_layers=1), name="a", seed=3)
    changed = logits(name, model, "a")
    assert not torch.allclose(changed, expected) and changed.isfinite().all()
    assert torch.equal(logits(name, model, None), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = {
        path
        for path, slot in lorica.adapters(model)["a"].slots.items()
        if any(not torch.equal(t, before[f"{path}.{key}"]) for key, t in slot.tensors.items())
    }
    assert fresh and all(".1." in path or "pooler" in path for path in fresh)
    assert ("bert.pooler.dense" in fresh) == (name == "bert")
    state = torch.get_rng_state()
    lorica.attach(model, Selective(reinit_top_layers=1), name="b", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(name, model, "b"), changed), "a function of the seed alone"
    lorica.attach(model, Selective(reinit_top_layers=1), name="c", seed=4)
    assert not torch.equal(logits(name, model, "c"), changed)


def test_they_are_drawn_as_the_class_draws_them():
    model = ARCHITECTURES["bert"].build()
    adapter = lorica.attach(model, Selective(reinit_top_layers=1), name="a")
    own = {f"{p}.{n}": t for p, s in adapter.slots.items() for n, t in s.tensors.items()}
    top = "bert.encoder.layer.1"
    assert own[f"{top}.intermediate.dense.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not own[f"{top}.intermediate.dense.bias"].any()
    assert bool((own[f"{top}.output.LayerNorm.weight"] == 1).all())
    gemma = ARCHITECTURES["gemma"].build()
    adapter = lorica.attach(gemma, Selective(reinit_top_layers=1), name="a")
    norms = [s for p, s in adapter.slots.items() if ".1." in p and "norm" in p]
    assert norms and not any(s.tensors["weight"].any() for s in norms), "gemma's norms are 1 + w"


def test_modules_of_torch_draw_themselves():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Plain()
    adapter = lorica.attach(model, Selective(reinit_top_layers=2), name="a")
    same = [
        torch.equal(s.tensors["weight"], model.get_submodule(p).weight)
        for p, s in adapter.slots.items()
    ]
    assert same == [True, False, False]
    model.layers[2].own = nn.Parameter(torch.ones(2))
    with pytest.raises(TargetError, match=r"nobody knows how layers\.2 begins anew: own"):
        lorica.attach(model, Selective(reinit_top_layers=1), name="b")
    assert list(lorica.adapters(model)) == ["a"]


def test_it_goes_through_a_file_and_merges(tmp_path):
    model = ARCHITECTURES["bert"].build()
    adapter = lorica.attach(model, Selective(reinit_top_layers=1), name="a")
    tuned = logits("bert", model, "a")
    lorica.save_adapter(adapter, tmp_path / "a")
    again = ARCHITECTURES["bert"].build()
    lorica.load_adapter(again, tmp_path / "a", name="a")
    assert torch.equal(logits("bert", again, "a"), tuned)
    lorica.merge(again, "a")
    torch.testing.assert_close(logits("bert", again, None), tuned)


def test_what_cannot_begin_anew_is_refused():
    with pytest.raises(ConfigError, match="goes with parameters=all"):
        Selective(parameters="bias", reinit_top_layers=1)
    with pytest.raises(ConfigError, match="more than last_layers=1"):
        Selective(last_layers=1, reinit_top_layers=2)
    with pytest.raises(ConfigError, match="a trial needs different numbers"):
        Selective(reinit_top_layers=(1, 1))
    model = ARCHITECTURES["bert"].build()
    with pytest.raises(TargetError, match=r"reinit_top_layers=9, but bert\.encoder\.layer has 2"):
        lorica.attach(model, Selective(reinit_top_layers=9))
    with pytest.raises(TargetError, match="does not train, so it cannot begin anew"):
        lorica.attach(model, Selective(reinit_top_layers=1, exclude_modules=("attention",)))
    with pytest.raises(ConfigError, match=r"\[0, 1\]: a trial must choose") as error:
        lorica.attach(model, Selective(reinit_top_layers=(0, 1)))
    assert "choose_top_layers" in str(error.value)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("bert", {"classifier"}),
        ("roberta", {"classifier.dense", "classifier.out_proj"}),
        ("llama", {"lm_head"}),
    ],
)
def test_the_head_alone(name, modules):
    model = ARCHITECTURES[name].build()
    adapter = lorica.attach(model, Selective(parameters="head"))
    assert set(adapter.slots) == modules


def test_a_tied_head_is_refused_by_name():
    with pytest.raises(TargetError, match="lm_head is tied") as error:
        lorica.attach(ARCHITECTURES["gpt2"].build(), Selective(parameters="head"))
    assert "'head'" in str(error.value)

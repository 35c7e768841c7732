"""Bottleneck adapters on whole models: where they sit, and AdapterHub's equations."""

import pytest
import torch
from torch.nn import functional as F

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.errors import TargetError
from lorica.methods import Bottleneck, Compacter


def paths(name: str, **settings) -> list[str]:
    return list(lorica.attach(ARCHITECTURES[name].build(), Bottleneck(**settings)).slots)


@pytest.mark.parametrize(
    ("name", "behind_attention", "behind_feedforward"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
        ("bert", "attention.output.dense", "output.dense"),
        ("opt", "self_attn.out_proj", "fc2"),
        ("t5", "SelfAttention.o", "DenseReluDense.wo"),
    ],
)
def test_they_sit_behind_attention_and_feedforward(name, behind_attention, behind_feedforward):
    both, one = paths(name), paths(name, layout="pfeiffer")
    assert any(path.endswith(behind_attention) for path in both)
    assert one and all(path.endswith(behind_feedforward) for path in one)
    assert set(one) < set(both)
    assert not any(path.endswith("attention.output.dense") for path in one)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_parallel_one_sits_beside_the_feedforward(name):
    model = ARCHITECTURES[name].build()
    adapter = lorica.attach(model, Bottleneck(layout="parallel", adapter_scaling=4), name="a")
    assert all(path.endswith(("mlp", "DenseReluDense")) for path in adapter.slots)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path, slot = next(iter(adapter.slots.items()))
    part, own = model.get_submodule(path), slot.tensors
    x = torch.randn(2, 3, 36)
    with torch.no_grad():
        with activate(model, None):
            plain = part(x)
        with activate(model, "a"):
            adapted = part(x)
        added = F.linear(
            torch.relu(F.linear(x, own["down"], own["down_bias"])), own["up"], own["up_bias"]
        )
    torch.testing.assert_close(adapted, plain + 4 * added)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_a_model_without_a_feedforward_module_says_so(name):
    with pytest.raises(TargetError, match="parallel needs a feed-forward module"):
        paths(name, layout="parallel")


def test_a_compacters_matrices_are_sums_of_kronecker_products():
    model = ARCHITECTURES["llama"].build()
    adapter = lorica.attach(model, Compacter(reduction_factor=3, phm_dim=4, phm_rank=2))
    method, slot = adapter.method, next(iter(adapter.slots.values()))
    with torch.no_grad():
        slot.tensors["up_S"] += 1
        own = method.matrices(dict(slot.tensors))
        expected = sum(
            torch.kron(R, S @ T)
            for R, S, T in zip(*(slot.tensors[f"up_{k}"] for k in "RST"), strict=True)
        )
    torch.testing.assert_close(own["up"], expected)
    assert own["down"].shape == (12, 36) and own["up"].shape == (36, 12)
    full = lorica.attach(model, Bottleneck(reduction_factor=3), name="b")
    assert adapter.num_parameters < full.num_parameters


def test_it_cannot_be_merged_and_says_what_to_do():
    model = ARCHITECTURES["llama"].build()
    lorica.attach(model, Bottleneck(layout="parallel"), name="a")
    with pytest.raises(lorica.LoricaError, match="keep the adapter and load it beside the base"):
        lorica.merge(model, "a")

"""Spectra of trained updates, and adapters cut to less of them."""

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.attach.plates import plates_of
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.search.spectra import cut, has_spectra, smaller_ranks, spectra, suggested


def adapted(architecture="llama", **method):
    """A model with an adapter whose factors are all random, as if it had trained."""
    model = ARCHITECTURES[architecture].build()
    how = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear", **method}
    adapter = attach(model, LoRA(**how), name="whole", seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return model, adapter


def deltas(model, adapter):
    """The update of every layer as a weight, by its path."""
    found = {}
    for path, slot in adapter.slots.items():
        layer = plates_of(model.get_submodule(path))[0].layer
        found[path] = slot.method.delta(slot.tensors, layer).detach()
    return found


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_a_cut_is_the_nearest_update_of_its_rank(how):
    model, adapter = adapted(**how)
    whole = deltas(model, adapter)
    less = cut(model, adapter, 2, name="less")
    for path, delta in deltas(model, less).items():
        U, S, Vh = torch.linalg.svd(whole[path].double(), full_matrices=False)
        nearest = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(delta.double(), nearest, rtol=0, atol=2e-6)
        assert less.slots[path].method.r == 2
    assert less.num_parameters * 3 == adapter.num_parameters


def test_a_cut_to_the_whole_rank_answers_as_before():
    model, adapter = adapted()
    tokens = torch.tensor([[5, 6, 7, 8]])
    same = cut(model, adapter, 6, name="same")
    with torch.no_grad():
        with activate(model, adapter):
            expected = model(tokens).logits
        with activate(model, same):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    detach(model, same)
    assert has_spectra(adapter)


def test_what_was_subtracted_at_the_start_belongs_to_the_update():
    model, adapter = adapted(init_lora_weights="pissa", r=3)
    whole = deltas(model, adapter)
    for one in spectra(adapter):
        S = torch.linalg.svdvals(whole[one.path].double())[:6]
        torch.testing.assert_close(torch.tensor(one.values).double(), S, rtol=1e-3, atol=1e-5)
    less = deltas(model, cut(model, adapter, 2, name="less"))
    for path, delta in less.items():
        U, S, Vh = torch.linalg.svd(whole[path].double(), full_matrices=False)
        torch.testing.assert_close(delta.double(), (U[:, :2] * S[:2]) @ Vh[:2], rtol=0, atol=1e-4)


def test_ranks_by_layer_are_kept_apart():
    model, adapter = adapted()
    ranks = {path: 1 + number % 3 for number, path in enumerate(adapter.slots)}
    less = cut(model, adapter, ranks, name="less")
    assert {path: slot.method.r for path, slot in less.slots.items()} == ranks
    assert all(slot.method.scale == 1 for slot in less.slots.values())


def test_the_spectrum_of_a_layer_is_that_of_its_update():
    model, adapter = adapted()
    whole = deltas(model, adapter)
    for one in spectra(adapter):
        S = torch.linalg.svdvals(whole[one.path].double())[:6]
        torch.testing.assert_close(torch.tensor(one.values).double(), S, rtol=1e-4, atol=1e-6)
        assert 1 <= one.energy_90 <= one.energy_99 <= 6 and 1 < one.effective < 6


def test_a_pattern_is_suggested_for_layers_that_need_another_rank():
    _, adapter = adapted()
    path = next(iter(adapter.slots))
    with torch.no_grad():
        adapter.slots[path].tensors["B"][:, 1:] = 0  # one direction alone
    found = spectra(adapter)
    r, pattern = suggested(found)
    needs = {one.path: one.energy_90 for one in found}
    assert pattern[path] == 1 and r > 1
    assert {p: pattern.get(p, r) for p in needs} == needs


def test_other_methods_have_no_such_spectra():
    model = ARCHITECTURES["llama"].build()
    assert not has_spectra(attach(model, DoRA(r=2, target_modules="all-linear"), name="d"))
    assert smaller_ranks(12, [3, 12, 16]) == [1, 2, 3, 4, 8]
    assert smaller_ranks(1) == []

"""An adapter that begins from another one: the same tensors, or what differs is told."""

import json

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.errors import AdapterFileError
from lorica.files.transfer import begin_from
from lorica.methods import (
    IA3,
    LISA,
    LoRA,
    LoRAFA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Selective,
    VeRA,
)

BOTH = ("q_proj", "up_proj")


def trained(folder, method, name="llama"):
    model = ARCHITECTURES[name].build()
    adapter = lorica.attach(model, method, name="old")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 10
    lorica.save_adapter(adapter, folder)
    return adapter


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=3, target_modules=BOTH),
        LoRA(r=3, rank_pattern={"up_proj": 5}, target_modules=BOTH, use_rslora=True),
        LoRAFA(r=3, target_modules=BOTH),
        VeRA(r=8, target_modules=BOTH),
        IA3(),
        Selective(parameters="norm"),
    ],
    ids=lambda method: method.kind,
)
def test_the_tensors_are_those_of_the_folder(method, tmp_path):
    old = trained(tmp_path / "old", method)
    model = ARCHITECTURES["llama"].build()
    adapter = lorica.attach(model, method, name="new", seed=9)
    handles = list(adapter.parameters())
    notes = begin_from(adapter, tmp_path / "old")
    assert len(notes) == 1 and list(lorica.adapters(model)) == ["new"]
    assert all(one is other for one, other in zip(handles, adapter.parameters(), strict=True))
    for path, slot in adapter.slots.items():
        for key, tensor in slot.tensors.items():
            assert torch.equal(tensor, old.slots[path].tensors[key]), (path, key)
    lorica.save_adapter(adapter, tmp_path / "new")
    facts = json.loads((tmp_path / "new" / "lorica.json").read_text())
    assert facts["began_from"]["path"] == str(tmp_path / "old")
    assert "begun from" in facts["reason"]


def test_a_new_head_keeps_its_own_start_and_that_is_said(tmp_path):
    trained(tmp_path / "old", LoRA(r=2, target_modules=("query",)), "bert")
    model = ARCHITECTURES["bert"].build()
    method = LoRA(r=2, target_modules=("query",), modules_to_save=("classifier",))
    adapter = lorica.attach(model, method, name="new")
    before = model.classifier.weight.clone()
    notes = begin_from(adapter, tmp_path / "old")
    assert len(notes) == 2 and notes[1].startswith("classifier keep a start of their own")
    assert torch.equal(adapter.slots["classifier"].tensors["weight"], before)
    trained(tmp_path / "headed", method, "bert")
    bare = lorica.attach(model, LoRA(r=2, target_modules=("query",)), name="bare")
    with pytest.raises(AdapterFileError, match="classifier: this run adapts nothing there"):
        begin_from(bare, tmp_path / "headed")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoRA(r=4, target_modules=BOTH), "its r is 3, here it is 4"),
        (LoRA(r=3, lora_alpha=3, target_modules=BOTH), "its scale is 5.33333, here it is 1"),
        (LoRA(r=3, target_modules=("q_proj",)), "up_proj: this run adapts nothing there"),
        (LoRA(r=3, target_modules="mlp"), "gate_proj: it has nothing there"),
        (VeRA(r=8, target_modules=BOTH), "it is lora, and this run trains vera"),
        (LoRA(r=3, target_modules=BOTH, init_lora_weights="pissa"), "it holds"),
    ],
)
def test_what_differs_is_refused_and_nothing_changes(method, said, tmp_path):
    trained(tmp_path / "old", LoRA(r=3, target_modules=BOTH))
    model = ARCHITECTURES["llama"].build()
    adapter = lorica.attach(model, method, name="new")
    before = [p.detach().clone() for p in adapter.parameters()]
    with pytest.raises(AdapterFileError) as error:
        begin_from(adapter, tmp_path / "old")
    assert said in str(error.value) and "leave init_adapter out" in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))
    assert list(lorica.adapters(model)) == ["new"] and not adapter.began_from


def test_kinds_whose_files_are_the_same_begin_from_each_other(tmp_path):
    for old, new in (
        (Selective(parameters="norm"), LISA(parameters="norm")),
        (PTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)),
        (
            PrefixTuning(num_virtual_tokens=3, prefix_projection=True),
            PrefixTuning(num_virtual_tokens=3),
        ),
    ):
        folder = tmp_path / new.kind
        trained(folder, old)
        model = ARCHITECTURES["llama"].build()
        source = lorica.load_adapter(model, folder, name="source")
        adapter = lorica.attach(model, new, name="new")
        begin_from(adapter, folder)
        for path, slot in adapter.slots.items():
            for key, tensor in slot.tensors.items():
                assert torch.equal(tensor, source.slots[path].tensors[key]), (path, key)


def test_a_network_that_files_do_not_hold_is_told(tmp_path):
    trained(tmp_path / "old", PTuning(num_virtual_tokens=3))
    adapter = lorica.attach(ARCHITECTURES["llama"].build(), PTuning(num_virtual_tokens=3))
    with pytest.raises(AdapterFileError, match="network that made its prompt is not in files"):
        begin_from(adapter, tmp_path / "old")


def test_copies_are_no_new_head_of_lisa(tmp_path):
    trained(tmp_path / "old", LISA(parameters="norm", layers_to_transform="0"))
    adapter = lorica.attach(ARCHITECTURES["llama"].build(), LISA(parameters="norm"))
    with pytest.raises(AdapterFileError, match="it has nothing there"):
        begin_from(adapter, tmp_path / "old")


def test_rows_of_tokens_keep_their_own_start(tmp_path):
    trained(tmp_path / "old", LoRA(r=2, target_modules=BOTH))
    method = LoRA(r=2, target_modules=BOTH, trainable_token_indices=(3,))
    notes = begin_from(lorica.attach(ARCHITECTURES["llama"].build(), method), tmp_path / "old")
    assert any("model.embed_tokens" in note and "start of their own" in note for note in notes)

"""Adapters that follow each other: each is given what the one before it made of the output."""

import json

import pytest
import torch
from torch import nn

import lorica
from architectures import ARCHITECTURES
from lorica.errors import ActivationError, ConfigError, MergeError
from lorica.methods import IA3, Bottleneck, LoRA, LoReFT, RoAd, Selective
from train.test_stages import answers, jolt, run, same, tensors

ALL = {"target_modules": "all-linear"}
IDS = torch.arange(1, 9)[None]
PAIRS = [
    (Bottleneck(reduction_factor=6), Bottleneck(reduction_factor=4)),
    (IA3(), IA3()),
    (RoAd(group_size=2, target_modules="attention"), IA3(target_modules="attention")),
    (LoRA(r=2, **ALL), Bottleneck(reduction_factor=6)),
]


class One(nn.Module):
    """A layer that is called by its name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Bottleneck(reduction_factor=2), Bottleneck(reduction_factor=3)),
        (RoAd(group_size=2), Bottleneck(reduction_factor=3)),
        (LoRA(r=2), RoAd(group_size=2)),
    ],
    ids=["bottlenecks", "road-bottleneck", "lora-road"],
)
def test_a_stack_is_one_after_the_other(first, second):
    torch.manual_seed(0)
    model = One()
    given = {"target_modules": ("layer",)}
    made = []
    for seed, method in enumerate((first, second)):
        method = type(method)(**{**vars(method), **given})
        made.append(jolt(lorica.attach(model, method, name=f"a{seed}"), seed))
    x = torch.randn(5, 6)
    y = model.layer.weight.new_tensor(0) + nn.functional.linear(
        x, model.layer.weight, model.layer.bias
    )
    layer = model.layer.__dict__["_lorica"].layer
    wanted = y
    for adapter in made:
        slot = adapter.slots["layer"]
        wanted = slot.method.apply(x, wanted, slot.tensors, layer)
    with torch.no_grad(), lorica.activate(model, lorica.Stack("a0", made[1])):
        found = model(x)
    assert torch.allclose(found, wanted, atol=1e-6)
    with torch.no_grad(), lorica.activate(model, {"a0": 1.0, "a1": 1.0}):
        assert not torch.allclose(model(x), wanted, atol=1e-4), "a sum is something else"


def test_for_lora_a_stack_is_the_sum():
    model = ARCHITECTURES["llama"].build().eval()
    for seed in (0, 1):
        jolt(lorica.attach(model, LoRA(r=2, **ALL), name=f"a{seed}", seed=seed), seed)
    both = answers(model, {"a0": 1.0, "a1": 1.0})
    assert torch.allclose(answers(model, lorica.Stack("a0", "a1")), both, atol=1e-5)
    assert torch.allclose(answers(model, lorica.Stack("a1", "a0")), both, atol=1e-5)


def test_edits_follow_each_other():
    model = ARCHITECTURES["llama"].build().eval()
    for seed in (0, 1):
        jolt(lorica.attach(model, LoReFT(r=2), name=f"a{seed}", seed=seed), seed)
    one, other = (answers(model, lorica.Stack(*names)) for names in (("a0", "a1"), ("a1", "a0")))
    assert not torch.allclose(one, other, atol=1e-4), "the order counts"
    assert not torch.allclose(one, answers(model, {"a0": 1.0, "a1": 1.0}), atol=1e-4)


@pytest.mark.parametrize(("lower", "upper"), PAIRS, ids=lambda method: method.kind)
def test_a_stacked_adapter_trains_is_saved_and_acts_alike(lower, upper, tmp_path):
    def built():
        model = ARCHITECTURES["llama"].build().eval()
        below = jolt(lorica.attach(model, lower, name="first"))
        return model, below, lorica.attach(model, upper, name="second", on=below, stacked=True)

    model, below, adapter = built()
    start, before = answers(model, below), tensors(below)
    assert torch.allclose(answers(model, adapter), start, atol=1e-5), "no change at its start"
    run(model, tmp_path / "run", steps=16)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3]) and same(before, tensors(below))
    trained = answers(model, adapter)
    assert torch.equal(answers(model, lorica.Stack("second")), trained)
    other = ARCHITECTURES["llama"].build().eval()
    loaded = lorica.load_adapter(other, tmp_path / "run" / "adapter", name="again")
    assert loaded.stacked and torch.equal(answers(other, "again"), trained)
    apart = lorica.attach(other, upper, name="apart")
    for path, slot in apart.slots.items():
        slot.tensors.update(loaded.slots[path].tensors)
    assert torch.equal(answers(other, lorica.Stack("again.on", "apart")), trained)


def test_what_cannot_be_stacked_is_refused():
    model = ARCHITECTURES["llama"].build().eval()
    below = jolt(lorica.attach(model, Bottleneck(), name="first"))
    with pytest.raises(ConfigError, match="stacked=True has no effect"):
        lorica.attach(model, IA3(), name="second", stacked=True)
    second = lorica.attach(model, IA3(), name="second", on=below, stacked=True)
    with pytest.raises(ConfigError, match="are stacked, and so must be"):
        lorica.attach(model, IA3(), name="third", on=second)
    for mixture in ({"second": 0.5}, ["second", None], {"second": 1.0, "first": 1.0}):
        with pytest.raises(ActivationError, match="acts on all rows, whole and by itself"):
            lorica.activate(model, mixture)
    for names, said in (
        (("first",), "at least two"),
        (("first", "first"), "at least two"),
        (("first", "secand"), "did you mean 'second'"),
    ):
        with pytest.raises(ConfigError, match=said):
            lorica.activate(model, lorica.Stack(*names))
    with pytest.raises(MergeError, match="second is stacked on first"):
        lorica.merge(model, "second")
    lorica.attach(model, IA3(), name="a")
    summed = lorica.attach(model, Selective(parameters="norm"), name="b", on="a")
    with pytest.raises(ConfigError, match="'b' is no sum with others any more"):
        lorica.activate(model, lorica.Stack("first", summed))

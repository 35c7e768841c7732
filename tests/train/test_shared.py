"""Frozen layers run once for adapters that see the same records: the same bits, fewer rows."""

import itertools

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.base import batch
from lorica.config import TrainSettings
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine, Trainee
from lorica.train.shared import SharedLayers
from train.words import WordTokenizer, examples


def trained(upper, *, shares=True, dropout=0.0, same=True, steps=3):
    """Tensors of adapters on the layers that `upper` gives for each, rows that the first layer was
    given in each pass, and how many passes shared the layers below.
    """
    model, task = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer())
    handles = [
        attach(
            model,
            LoRA(r=2 + i, target_modules="all-linear", layers_to_transform=[layer]),
            name=f"a{i}",
            seed=i,
        )
        for i, layer in enumerate(upper)
    ]
    layers = SharedLayers(model, task)
    engine = Engine(model, task, **({"sharing": layers.shared} if shares else {}))
    settings = TrainSettings(learning_rate=1e-2, max_steps=steps)
    trainees = [Trainee(handle, settings, steps) for handle in handles]
    rows = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    model.train()
    for step in range(steps):
        blocks = [examples(step, 4) for _ in trainees]
        blocks = [blocks[0]] * len(trainees) if same else blocks
        engine.step(trainees, [[block] for block in blocks])
    found = [{k: p.detach().clone() for k, p in h.named_parameters()} for h in handles]
    return found, rows[-steps:], layers.passes


@pytest.mark.parametrize("upper", [(1, 1), (1, 1, 1)])
def test_the_layers_below_run_once_and_give_the_same_bits(upper):
    shared, rows, passes = trained(upper)
    whole, all_rows, _ = trained(upper, shares=False)
    assert passes == 3
    assert [len(upper) * one for one in rows] == all_rows
    for own, other in zip(shared, whole, strict=True):
        assert all(torch.equal(tensor, other[key]) for key, tensor in own.items())
        assert any(t.abs().sum() > 0 for k, t in own.items() if k.endswith(".B"))


def test_nothing_is_shared_where_an_adapter_acts_from_the_first_layer_on():
    assert trained((0, 1))[2] == 0


def test_other_records_go_through_by_themselves():
    assert trained((1, 1), same=False)[2] == 0


def test_activations_below_are_given_the_rows_of_each_set_of_records(monkeypatch):
    """With three threads and more their bits depend on the rows beside; see `ops.glu`."""
    told = []

    def beside(model, *ranges):
        told.append(ranges)
        return batch.beside(model, *ranges)

    monkeypatch.setitem(SharedLayers.__init__.__globals__, "beside", beside)
    trained((1, 1, 1), steps=1)
    ((rows,),) = told
    assert rows[0][0] == 0
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(rows))

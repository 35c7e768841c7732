"""Training the rows of some tokens: what moves, beside others, and as gradients."""

import pytest
import torch

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.methods import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine, Trainee
from train.words import WordTokenizer, examples

TOKENS = tuple(sorted({*examples(0, 5)[0].input_ids[:-1]}))[:3]
ONE, TWO, THREE = TOKENS
OTHERS = [i for i in range(1, 90) if i not in TOKENS][:2]
METHOD = LoRA(r=2, target_modules=("q_proj",), trainable_token_indices=TOKENS)


def trained(base, names, steps=4):
    model = ARCHITECTURES[base].build()
    for number, name in enumerate(names):
        attach(model, METHOD, name=name, seed=number)
    settings = TrainSettings(learning_rate=2e-2, max_steps=steps)
    trainees = [Trainee(lorica.adapters(model)[name], settings, steps) for name in names]
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    for step in range(steps):
        engine.step(trainees, [[examples(9 * i + step, 5)] for i in range(len(names))])
    return model


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_beside_others_it_trains_as_alone_and_moves_its_rows_only(base):
    before = ARCHITECTURES[base].build().get_input_embeddings().weight
    alone, beside = trained(base, ["a"]), trained(base, ["a", "b"])
    one, other = (dict(lorica.adapters(m)["a"].named_parameters()) for m in (alone, beside))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    rows = one["model.embed_tokens.rows"]
    assert (rows != before[list(TOKENS)]).any(1).all()
    assert torch.equal(alone.get_input_embeddings().weight, before)
    ids = torch.tensor([[OTHERS[0], ONE, OTHERS[1], THREE, TWO]])
    with torch.no_grad(), activate(alone, "a"):
        embedded = alone.get_input_embeddings()(ids)[0]
    torch.testing.assert_close(embedded[[1, 3, 4]], rows.detach()[[0, 2, 1]])
    assert torch.equal(embedded[[0, 2]], before[OTHERS])


@pytest.mark.parametrize("layer", ["embedding", "head"])
def test_gradients_are_right_in_float64(layer):
    model = ARCHITECTURES["llama-tied"].build().double()
    adapter = attach(model, METHOD, name="a")
    slot = adapter.slots["model.embed_tokens"]
    start = slot.tensors["rows"].detach().double().add(0.1).requires_grad_()
    module = model.model.embed_tokens if layer == "embedding" else model.lm_head
    x = torch.tensor([[ONE, OTHERS[0], THREE, TWO, TWO]])
    if layer == "head":
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 36, generator=generator, dtype=torch.float64, requires_grad=True)

    def adapted(x, rows):
        slot.tensors["rows"] = rows
        return module(x)

    with activate(model, "a"):
        assert torch.autograd.gradcheck(adapted, (x, start), fast_mode=True)


def test_each_row_of_a_batch_has_its_own_mixture():
    model = trained("llama-tied", ["a", "b"])
    ids = torch.tensor([[OTHERS[0], ONE, OTHERS[1], THREE, TWO]] * 3)
    with torch.no_grad():
        with activate(model, ["a", None, {"a": 0.5, "b": 0.5}]):
            together = model(ids).logits
        for number, mixture in enumerate(["a", None, {"a": 0.5, "b": 0.5}]):
            with activate(model, mixture):
                alone = model(ids[:1]).logits[0]
            torch.testing.assert_close(together[number], alone, rtol=1e-5, atol=1e-5)

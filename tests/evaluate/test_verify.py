"""A merged model passes against base and adapter; every planted mistake is refused."""

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.errors import CheckRefused, ConfigError
from lorica.evaluate.verify import Question, expect, judge, random_prompts, verify
from lorica.methods.lora import LoRA
from lorica.mix import merge

NAMES = ["llama", "gpt2", "bert", "t5"]


def stirred(model: nn.Module, name: str = "a", size: float = 0.1):
    adapter = attach(model, LoRA(r=3, target_modules="all-linear"), name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


def merged(name: str, weight: float = 1.0) -> nn.Module:
    model = ARCHITECTURES[name].build()
    merge(model, {stirred(model).name: weight})
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_true_merge_passes(name):
    model = ARCHITECTURES[name].build()
    stirred(model)
    found = verify(model, "a", merged(name))
    assert found.ok and found.lost < 1e-4 and found.same == found.tokens
    assert found.effect > 0.01 and "the same: 6 prompts" in str(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mistake, lost", [("left out", 1.0), ("half", 0.5), ("twice", 1.0)])
def test_planted_mistakes_are_refused(name, mistake, lost):
    model = ARCHITECTURES[name].build()
    stirred(model)
    weight = {"left out": 0.0, "half": 0.5, "twice": 2.0}[mistake]
    found = verify(model, "a", merged(name, weight), precision="bfloat16")
    assert not found.ok and found.lost > 0.8 * lost
    if mistake == "left out":
        assert found.lost == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(CheckRefused, match="does not answer as its base"):
        found.check()


def test_one_place_that_was_forgotten_is_found():
    model, other = ARCHITECTURES["llama"].build(), merged("llama")
    stirred(model)
    place = "model.layers.0.self_attn.k_proj"
    plain = ARCHITECTURES["llama"].build().get_submodule(place)
    other.get_submodule(place).load_state_dict(plain.state_dict())
    found = verify(model, "a", other)
    assert not found.ok and 0.01 < found.lost < 0.9


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_half_precision_passes_at_its_own_limit(dtype, name):
    model, other = ARCHITECTURES["llama"].build(), merged("llama").to(dtype).float()
    stirred(model)
    expected = expect(model, "a")
    assert judge(expected, other, precision=name).ok
    strict = judge(expected, other, precision="float32")
    assert strict.lost > 5e-4  # the limits are far from each other for a reason


def test_a_clear_token_that_differs_is_refused():
    """Although the error is small on the whole."""
    model = ARCHITECTURES["llama"].build()
    stirred(model)
    expected = expect(model, "a")
    effect = torch.cat(expected.attached).sub(torch.cat(expected.base)).square().mean().sqrt()
    best = [logits.topk(2) for logits in expected.attached]
    number, place = next(
        (number, place)
        for number, found in enumerate(best)
        for place, (first, second) in enumerate(found.values.tolist())
        if 0.1 * effect < first - second < 0.5 * effect
    )

    def other(question: Question) -> torch.Tensor:
        logits = expected.attached[expected.questions.index(question)].clone()
        if question is expected.questions[number]:
            logits[place, best[number].indices[place]] = best[number].values[place].flip(0)
        return logits

    found = judge(expected, other)
    assert found.lost < found.limit and found.flipped == 1 and found.same == found.tokens - 1
    assert not found.ok and "although they were clear" in found.problems[0]


def test_the_base_stays_as_it_was_active():
    model = ARCHITECTURES["llama"].build()
    stirred(model)
    activate(model, "a")
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    verify(model, {"a": 0.5}, merged("llama", 0.5))
    assert torch.equal(model(ids).logits, before)


def test_what_cannot_be_compared():
    model = ARCHITECTURES["llama"].build()
    stirred(model)
    with pytest.raises(ConfigError, match="did you mean bfloat16"):
        verify(model, "a", merged("llama"), precision="bfloat")
    with pytest.raises(ConfigError, match="nothing to ask"):
        verify(model, "a", merged("llama"), [[]])
    found = verify(model, "a", lambda question: torch.zeros(1, 5))
    assert not found.ok and "logits of the shape (1, 5)" in found.problems[0]
    nan = verify(model, "a", lambda question: torch.full((13, 97), float("nan")))
    assert not nan.ok and "NaN" in nan.problems[0]


def test_an_adapter_without_effect_is_equal_to_its_base():
    model = ARCHITECTURES["llama"].build()
    attach(model, LoRA(r=2, target_modules="q_proj"), name="a")
    assert verify(model, "a", ARCHITECTURES["llama"].build()).ok
    assert not verify(model, "a", merged("llama")).ok
    assert len(random_prompts(model)) == 6 and random_prompts(model) == random_prompts(model)

"""Weights by place and by step: exact, and without arithmetic on weights."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.attach.handle import Adapter, adapters
from lorica.attach.weights import at_place
from lorica.errors import ActivationError, ConfigError
from lorica.methods import METHODS, LoRA


def stirred(model: nn.Module, name: str, method=None) -> Adapter:
    method = method or LoRA(r=3, target_modules="all-linear")
    adapter = attach(model, method, name=name)
    generator = torch.Generator().manual_seed(ord(name[0]))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapter


def pair(name: str = "llama", *methods) -> nn.Module:
    model = ARCHITECTURES[name].build()
    for letter, method in zip("ab", methods or (None, None), strict=True):
        stirred(model, letter, method)
    return model


def answer(name: str, model: nn.Module) -> torch.Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(model, 2, 7)))


def summed(model: nn.Module, weights) -> nn.Module:
    """The base with the weighted sum of the deltas in its weights, made here, layer by layer."""
    by_hand = copy.deepcopy(model)
    known = adapters(by_hand)
    with torch.no_grad(), activate(by_hand, None):
        for path in dict.fromkeys(p for a in known.values() for p in a.slots):
            module = by_hand.get_submodule(path)
            layer = module.__dict__["_lorica"].layer
            for name, adapter in known.items():
                slot = adapter.slots[path]
                module.weight += weights(name, path) * slot.method.delta(slot.tensors, layer)
    activate(by_hand, None)
    return by_hand


PLACED = {
    "a block": {"layers.0": 0.5},
    "a part of blocks": {"mlp": -0.7, "*": 0.2},
    "a layer's name": {"q_proj": 2.0},
    "the first that fits": {"layers.1.self_attn": 0.25, "self_attn": 0.0, "layers.[0-1]": -1.5},
}


@pytest.mark.parametrize("case", PLACED)
def test_weights_by_place_are_the_exact_sum(case):
    """In float64, where nothing else rounds; a layer in float32 is below."""
    model = pair().double()
    with activate(model, {"a": PLACED[case], "b": -0.4}):
        made = answer("llama", model)

    def weight(name: str, path: str) -> float:
        if name == "b":
            return -0.4
        return {
            "a block": 0.5 if ".0." in path else 1.0,
            "a part of blocks": -0.7 if ".mlp." in path else 0.2,
            "a layer's name": 2.0 if path.endswith("q_proj") else 1.0,
            "the first that fits": 0.25
            if ".1.self_attn" in path
            else 0.0
            if "self_attn" in path
            else -1.5,
        }[case]

    wanted = answer("llama", summed(model, weight))
    assert (wanted - answer("llama", summed(model, lambda name, path: 1.0))).abs().max() > 1e-3
    assert (made - wanted).abs().max() <= 1e-6 * max(1.0, wanted.abs().max().item())


def test_a_layer_in_float32_is_within_1e_6_of_the_sum_of_the_deltas():
    model = pair()
    weights = {"a": {"layers.0": 0.7, "*": -1.3}, "b": -0.4}
    for path in adapters(model)["a"].slots:
        module = model.get_submodule(path)
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1))
        layer = module.__dict__["_lorica"].layer
        total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        for name, weight in (("a", 0.7 if ".0." in path else -1.3), ("b", -0.4)):
            slot = adapters(model)[name].slots[path]
            tensors = {key: tensor.double() for key, tensor in slot.tensors.items()}
            total += weight * slot.method.delta(tensors, layer)
        with torch.no_grad():
            with activate(model, None):
                bare = module(x).double()
            with activate(model, weights):
                made = module(x).double()
        wanted = bare + x.double() @ total.T
        assert (made - wanted).abs().max() <= 1e-6 * max(1.0, wanted.abs().max().item())


def test_weights_by_place_and_row():
    model = pair()
    rows = [{"a": {"layers.0": 0.5}}, {"a": 0.3, "b": {"mlp": 0.0}}]
    with activate(model, rows):
        both = answer("llama", model)
    for number, entry in enumerate(rows):
        with activate(model, entry):
            torch.testing.assert_close(both[number], answer("llama", model)[number])


@pytest.mark.parametrize("kind", ["loha", "dora", "ia3", "bottleneck"])
def test_other_methods_are_weighted_by_place_too(kind):
    model = pair("llama", METHODS[kind](), None)
    places = list(adapters(model)["a"].slots)
    low, high = [p for p in places if ".0." in p], [p for p in places if ".1." in p]
    assert low and high
    with activate(model, {"a": {"layers.0": 0.0}}):
        made = answer("llama", model)
    for path in low:  # as if it did not sit there
        del model.get_submodule(path).__dict__["_lorica"].slots["a"]
    with activate(model, "a"):
        torch.testing.assert_close(made, answer("llama", model), atol=1e-6, rtol=1e-6)


def test_a_schedule_is_a_list_or_a_function_of_the_step():
    model = pair()
    wanted = []
    for weight in (1.0, 0.5, -0.25, -0.25):
        with activate(model, {"a": weight, "b": 0.3}):
            wanted.append(answer("llama", model))
    listed, steps = [1.0, 0.5, -0.25], []

    def function(step: int) -> float:
        steps.append(step)
        return listed[min(step, 2)]

    for schedule in (listed, function, {"*": listed}):
        with activate(model, {"a": schedule, "b": 0.3}) as active:
            for expected in wanted:
                assert torch.equal(answer("llama", model), expected)
            active.restart()
            assert torch.equal(answer("llama", model), wanted[0])
    assert steps[1:5] == [0, 1, 2, 3] and not model._forward_pre_hooks


def test_a_schedule_at_one_block_alone():
    model = pair()
    with activate(model, {"a": {"layers.0": [0.0, 1.0], "*": 0.5}}):
        first, second = answer("llama", model), answer("llama", model)
    for weight, made in ((0.0, first), (1.0, second)):
        with activate(model, {"a": {"layers.0": weight, "*": 0.5}}):
            assert torch.equal(made, answer("llama", model))


def test_steps_of_generated_text_begin_with_every_text():
    """The prompt is step 0, each token after it one more; by hand, with a fixed weight each."""
    model = pair()
    ids = torch.tensor([[5, 6, 7, 8]])
    schedule = [0.0, 3.0, -3.0, 1.0]
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with activate(model, {"a": schedule}):
        texts = [model.generate(ids, use_cache=True, **how) for _ in range(2)]
    assert torch.equal(*texts)
    cache, given, tokens = hf.DynamicCache(), ids, []
    with torch.no_grad():
        for step in range(5):
            with activate(model, {"a": schedule[min(step, 3)]}):
                logits = model(given, past_key_values=cache, use_cache=True).logits
            given = logits[:, -1:].argmax(-1)
            tokens.append(given.item())
    assert texts[0][0, 4:].tolist() == tokens
    with activate(model, {"a": 0.0}):
        assert model.generate(ids, **how)[0, 4:].tolist() != tokens


def test_a_schedule_rests_while_another_activation_is_in_force():
    model = pair()
    with activate(model, {"a": [1.0, 0.0]}) as active:
        first = answer("llama", model)
        with activate(model, {"a": [0.0]}):
            assert not torch.equal(answer("llama", model), first)
            answer("llama", model)
        assert active.schedule is not None and active.schedule.step == 0
        last = answer("llama", model)
    with activate(model, None):
        assert torch.equal(last, answer("llama", model))
    assert not model._forward_pre_hooks


def test_detaching_ends_a_schedule():
    model = pair()
    activate(model, {"a": [1.0, 0.0]})
    detach(model, "a")
    assert not model._forward_pre_hooks
    answer("llama", model)


def test_an_adapter_below_follows_the_weights_of_the_one_above():
    model = ARCHITECTURES["llama"].build()
    stirred(model, "low")
    attach(model, LoRA(r=2, target_modules="q_proj"), name="top", on="low")
    with activate(model, {"top": {"layers.0": 0.5}}):
        made = answer("llama", model)
    assert torch.equal(made, answer("llama", model)) is False  # nothing is active any more
    with activate(model, {"low": {"layers.0": 0.5}}):
        torch.testing.assert_close(made, answer("llama", model))
    with pytest.raises(ConfigError, match="takes part twice"):
        activate(model, {"top": {"layers.0": 0.5}, "low": 0.5})


WRONG = {
    "a pattern for nothing": {"a": {"layers.7": 0.5}},
    "one that an earlier one takes": {"a": {"*": 1.0, "mlp": 0.5}},
    "by place and by place": {"a": {"mlp": {"up_proj": 0.5}}},
    "no numbers": {"a": [1.0, "x"]},
    "no steps": {"a": []},
    "no places": {"a": {}},
    "not finite": {"a": {"mlp": float("nan")}},
    "a word": {"a": "much"},
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_are_refused(case):
    model = pair()
    with pytest.raises(ConfigError):
        activate(model, WRONG[case])


def test_a_function_that_gives_no_number():
    with pytest.raises(ActivationError, match="gave None for step 0"):
        activate(pair(), {"a": lambda step: None})


def test_how_a_weight_finds_its_place():
    weight = {"layers.[2-3]": 0.5, "q_proj": 0.25}
    assert at_place(weight, "model.layers.2.mlp.up_proj") == 0.5
    assert at_place(weight, "model.layers.12.self_attn.q_proj") == 0.25
    assert at_place(weight, "model.layers.1.mlp.up_proj") == 1.0

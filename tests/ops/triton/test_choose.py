"""The twins are reached through the ops, and adapters side by side train through them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorica.attach.activate import Activation
from lorica.attach.attach import attach
from lorica.attach.plates import Route
from lorica.methods.lora import LoRA
from lorica.ops import lora as torch_path
from lorica.ops.lora import Segment, lora_linear
from lorica.ops.triton.choose import TWINS, twin
from ops.triton.compare import random


@pytest.mark.parametrize("op", [name for names in TWINS.values() for name in names])
def test_every_twin_is_there_for_half_precision(op, device):
    assert callable(twin(op, torch.zeros(1, dtype=torch.bfloat16, device=device)))


def test_not_for_double_precision_nor_for_tensors_that_lie_apart(device):
    x = torch.zeros(1, device=device)
    assert twin("rms_norm", x) is not None and twin("rms_norm", x.double()) is None
    assert twin("swiglu", x, torch.zeros(1, device="meta")) is None
    assert twin("lora_linear", x) is None  # matrices in float32


@pytest.fixture
def asked(monkeypatch):
    """What the ops ask for: names, and whether they were given a twin."""
    found = []

    def noting(op, *tensors):
        answer = twin(op, *tensors)
        found.append((op, answer is not None))
        return answer

    monkeypatch.setattr(torch_path, "twin", noting)
    return found


def product(spans, dtype, device):
    """Output and gradients of one layer with an adapter for every span."""
    x = random(70, 33).to(device, dtype).requires_grad_()
    y = random(70, 16, seed=1).to(device, dtype)
    factors, segments = [], []
    for i, span in enumerate(spans):
        A = random(3, 33, seed=10 + i).to(device).float().requires_grad_()
        B = random(16, 3, seed=20 + i).to(device).float().requires_grad_()
        factors += [A, B]
        segments.append(Segment(*span, A, B, scale=0.5))
    out = lora_linear(x, y, segments)
    out.float().square().sum().backward()
    return out, [x.grad, *(t.grad for t in factors)]


@pytest.mark.parametrize("spans", [[(0, 70)], [(0, 33), (33, 70)]])
def test_the_op_takes_them_and_the_result_stays(spans, asked, device, monkeypatch):
    out, gradients = product(spans, torch.bfloat16, device)
    assert asked == [("lora_linear", True)]
    assert type(out.grad_fn)._forward_cls.__module__ == "lorica.ops.triton.lora"
    monkeypatch.setattr(torch_path, "twin", lambda *_: None)
    expected, others = product(spans, torch.bfloat16, device)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients, others, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_float32_takes_the_torch_path(asked, device):
    product([(0, 33), (33, 70)], torch.float32, device)
    assert asked and not any(given for _, given in asked)


def step(model, adapters, ids):
    """The loss of one row for each adapter, and the gradients of all their tensors."""
    rows = [(i * ids.shape[1], (i + 1) * ids.shape[1], a.name) for i, a in enumerate(adapters)]
    with Activation(model, Route(tuple(a.name for a in adapters), None, tuple(rows))):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    found = [p.grad.clone() for a in adapters for p in a.parameters()]
    model.zero_grad()
    for a in adapters:
        for p in a.parameters():
            p.grad = None
    return loss.item(), torch.cat([t.flatten() for t in found])


def test_two_adapters_in_one_pass_of_a_model(asked, device, monkeypatch):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(shape).to(device, torch.bfloat16)
    method = LoRA(r=3, target_modules="all-linear", init_lora_weights="random")
    adapters = [attach(model, method, name=name) for name in ("one", "two")]
    ids = torch.randint(67, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)
    loss, gradients = step(model, adapters, ids)
    found = [asked.count((op, True)) for op in ("lora_linear", "adapted_linear")]
    assert sum(found) == 14  # every linear layer but the head
    monkeypatch.setattr(torch_path, "twin", lambda *_: None)
    expected, others = step(model, adapters, ids)
    assert abs(loss - expected) < 1e-2 * expected
    assert (gradients - others).norm() < 0.02 * others.norm()

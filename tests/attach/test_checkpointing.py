"""What is recomputed in the backward pass runs under the adapters of its forward pass, or not."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import Activation, activate
from lorica.attach.handle import Adapter
from lorica.attach.plates import Route
from lorica.attach.probe import unvisited
from lorica.errors import ActivationError
from lorica.methods.lora import LoRA

KINDS = pytest.mark.parametrize("reentrant", [False, True])


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.settings: dict | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            step = functools.partial(self._step, block)
            x = step(x) if self.settings is None else checkpoint(step, x, **self.settings)
        return x

    @staticmethod
    def _step(block: nn.Module, x: Tensor) -> Tensor:
        return block(x).tanh()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def _model(dropout: float = 0.0) -> tuple[Blocks, Adapter, Adapter]:
    torch.manual_seed(0)
    model = Blocks()
    method = LoRA(
        r=2, target_modules="all-linear", init_lora_weights="random", lora_dropout=dropout
    )
    return (
        model,
        lorica.attach(model, method, name="a"),
        lorica.attach(model, method, name="b", seed=1),
    )


def _input() -> Tensor:
    return X.clone().requires_grad_()


def _taken(adapter: Adapter) -> list[Tensor]:
    found = [p.grad for p in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


def _equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@KINDS
@pytest.mark.parametrize("mixture", ["a", {"a": 0.5, "b": 2.0}, ["a", "b", None, "a", "b"]])
def test_inside_the_activation_it_changes_no_bit(reentrant, mixture):
    model, a, _ = _model()
    with activate(model, mixture):
        model(_input()).square().sum().backward()
    expected = _taken(a)
    model.settings = {"use_reentrant": reentrant}
    with activate(model, mixture):
        model(_input()).square().sum().backward()
        assert unvisited(model) == []
    assert _equal(_taken(a), expected)


@KINDS
@pytest.mark.parametrize("later", [None, "b"])
def test_backward_outside_is_refused(reentrant, later):
    model, a, b = _model()
    with torch.no_grad(), activate(model, None):
        model(X)  # as an evaluation before
    model.settings = {"use_reentrant": reentrant}
    with activate(model, "a"):
        loss = model(_input()).square().sum()
    refused = pytest.raises(ActivationError, match=r"blocks\.2 was recomputed .*another activation")
    with refused, activate(model, later):
        loss.backward()
    assert all(p.grad is None for adapter in (a, b) for p in adapter.parameters())
    with activate(model, "b"):  # and the model can go on
        model(_input()).sum().backward()
    _taken(b)


def test_backward_outside_after_others_ran_is_refused():
    model, a, _ = _model()
    model.settings = {"use_reentrant": False}
    activate(model, "b")
    model(_input())
    with activate(model, "a"):
        loss = model(_input()).square().sum()
    with pytest.raises(ActivationError, match="another activation"):
        loss.backward()
    assert all(p.grad is None for p in a.parameters())


def test_a_reference_pass_in_between_is_fine():
    """As in preference training: the base answers without gradients before the backward pass."""
    model, a, _ = _model()
    with activate(model, "a"):
        model(_input()).square().sum().backward()
    expected = _taken(a)
    model.settings = {"use_reentrant": False}
    with activate(model, "a"):
        loss = model(_input()).square().sum()
        with torch.no_grad(), activate(model, None):
            model(X)
        loss.backward()
    assert _equal(_taken(a), expected)


@KINDS
def test_dropout_is_recomputed_with_the_same_mask(reentrant):
    model, a, _ = _model(dropout=0.4)
    route = Route(("a",), dropout_seed=7)
    with Activation(model, route):
        model(_input()).square().sum().backward()
    expected = _taken(a)
    model.settings = {"use_reentrant": reentrant}
    with Activation(model, route):
        model(_input()).square().sum().backward()
    assert _equal(_taken(a), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_models_of_transformers(name):
    arch = ARCHITECTURES[name]
    model = arch.build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    inputs = arch.sample(model, 2, 5)
    method = LoRA(r=2, target_modules="all-linear", init_lora_weights="random")
    adapter = lorica.attach(model, method)
    with activate(model, adapter):
        torch.manual_seed(0)
        arch.logits(model(**inputs)).square().mean().backward()
    expected = _taken(adapter)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with activate(model, adapter):
        torch.manual_seed(0)
        arch.logits(model(**inputs)).square().mean().backward()
    for one, two in zip(_taken(adapter), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def test_the_private_function_that_tells_a_recomputation_is_there():
    assert torch._C._current_graph_task_id() == -1
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(torch._C._current_graph_task_id()))
    y.sum().backward()
    assert seen and seen[0] != -1

"""Beside other tools that change modules, in both orders: it works, or detach refuses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lorica
from lorica.attach.activate import activate
from lorica.attach.probe import unvisited
from lorica.attach.site import is_site
from lorica.errors import LoricaError
from lorica.methods.lora import LoRA

accelerate_hooks = pytest.importorskip("accelerate.hooks")
METHOD = LoRA(r=2, target_modules=("layer",), init_lora_weights="random")
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _model() -> Net:
    torch.manual_seed(0)
    return Net()


def _attached(model: Net) -> Net:
    lorica.attach(model, METHOD)
    activate(model, None)
    return model


def _run(model: nn.Module, mixture=None) -> Tensor:
    with torch.no_grad(), activate(model, mixture):
        return model(X)


class Doubling(accelerate_hooks.ModelHook):
    """Shows that it ran: doubles what comes out."""

    def post_forward(self, module, output):
        return 2 * output


def _expected() -> tuple[Tensor, Tensor]:
    """Base and adapted output, without any tool."""
    model = _attached(_model())
    return _run(model), _run(model, "default")


def test_a_hook_of_accelerate_that_was_there_before():
    base, adapted = _expected()
    model = _model()
    accelerate_hooks.add_hook_to_module(model.layer, Doubling())
    forward = model.layer.__dict__["forward"]
    _attached(model)
    torch.testing.assert_close(_run(model), 2 * base)
    torch.testing.assert_close(_run(model, "default"), 2 * base + (adapted - base))
    with activate(model, "default"):
        model(X)
        assert unvisited(model) == []
    lorica.detach(model, "default")
    assert model.layer.__dict__["forward"] is forward and type(model.layer) is nn.Linear
    torch.testing.assert_close(model(X), 2 * base)
    accelerate_hooks.remove_hook_from_module(model.layer)
    torch.testing.assert_close(model(X), base)


def test_a_hook_of_accelerate_removed_while_attached_is_noticed():
    """It puts the layer's old forward back on the instance, past the site."""
    model = _model()
    accelerate_hooks.add_hook_to_module(model.layer, Doubling())
    _attached(model)
    accelerate_hooks.remove_hook_from_module(model.layer)
    with activate(model, "default"):
        model(X)
        assert unvisited(model) == ["layer"]
    with pytest.raises(LoricaError, match="its forward was replaced after attaching"):
        lorica.detach(model, "default")


def test_a_hook_of_accelerate_that_came_later():
    base, adapted = _expected()
    model = _attached(_model())
    accelerate_hooks.add_hook_to_module(model.layer, Doubling())
    torch.testing.assert_close(_run(model, "default"), 2 * adapted)
    with pytest.raises(LoricaError, match="forward was replaced after attaching"):
        lorica.detach(model, "default")
    assert is_site(model.layer) and lorica.adapters(model).keys() == {"default"}
    torch.testing.assert_close(_run(model, "default"), 2 * adapted)
    accelerate_hooks.remove_hook_from_module(model.layer)
    torch.testing.assert_close(_run(model, "default"), adapted)
    lorica.detach(model, "default")
    assert type(model.layer) is nn.Linear and "forward" not in model.layer.__dict__
    torch.testing.assert_close(model(X), base)


def test_weights_kept_on_the_disk_by_accelerate(tmp_path):
    from accelerate import disk_offload

    base, adapted = _expected()
    model = _model()
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.layer.weight.is_meta
    _attached(model)
    torch.testing.assert_close(_run(model), base)
    torch.testing.assert_close(_run(model, "default"), adapted)
    lorica.detach(model, "default")
    assert model.layer.weight.is_meta
    torch.testing.assert_close(model(X), base)


def test_a_parametrization_that_was_there_before():
    model = _model()
    parametrizations.weight_norm(model.layer)
    kind, base = type(model.layer), model(X).detach()
    adapter = lorica.attach(model, METHOD)
    assert type(model.layer).__name__ == kind.__name__
    assert torch.equal(_run(model), base)
    slot = adapter.slots["layer"]
    update = X @ (8.0 * slot.tensors["B"] @ slot.tensors["A"]).detach().t()
    torch.testing.assert_close(_run(model, "default"), base + update)
    lorica.detach(model, "default")
    assert type(model.layer) is kind and torch.equal(model(X), base)
    parametrize.remove_parametrizations(model.layer, "weight")
    assert type(model.layer) is nn.Linear


def test_a_parametrization_that_came_later_works_and_detach_refuses():
    base, adapted = _expected()
    model = _attached(_model())
    lorica.attach(model, LoRA(r=1, target_modules=("layer",)), name="second")
    parametrizations.weight_norm(model.layer)
    kind, kept = type(model.layer), dict(model.layer.__dict__)
    torch.testing.assert_close(_run(model, "default"), adapted)
    lorica.detach(model, "second")  # the site stays, so nothing is in the way
    with pytest.raises(LoricaError, match=r"(?s)its class was changed again.*undo that first"):
        lorica.detach(model, "default")
    assert type(model.layer) is kind and model.layer.__dict__ == kept
    assert not any(p.requires_grad for n, p in model.named_parameters() if "original" not in n)
    torch.testing.assert_close(_run(model, "default"), adapted)
    parametrize.remove_parametrizations(model.layer, "weight")
    lorica.detach(model, "default")
    assert type(model.layer) is nn.Linear
    torch.testing.assert_close(model(X), base)


def test_refusing_one_of_many_sites_changes_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 5))
    lorica.attach(model, LoRA(r=2, target_modules="all-linear", init_lora_weights="random"))
    expected = _run(model, "default")
    parametrizations.weight_norm(model[2])
    with pytest.raises(LoricaError):
        lorica.detach(model, "default")
    assert all(is_site(m) for m in model)
    torch.testing.assert_close(_run(model, "default"), expected)


@pytest.mark.parametrize("first", [True, False])
def test_a_hook_of_the_user_sees_the_adapted_output(first):
    base, adapted = _expected()
    model, seen = _model(), []

    def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.append(output.clone())

    if first:
        model.layer.register_forward_hook(look)
    _attached(model)
    if not first:
        model.layer.register_forward_hook(look)
    output = _run(model, "default")
    torch.testing.assert_close(output, adapted)
    torch.testing.assert_close(seen[0], adapted)
    _run(model)
    torch.testing.assert_close(seen[1], base)
    lorica.detach(model, "default")
    model(X)
    assert len(seen) == 3


def test_a_hook_that_changes_the_input_changes_that_of_the_adapter():
    model = _attached(_model())
    expected = _run(model, "default")
    model.layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    with torch.no_grad(), activate(model, "default"):
        torch.testing.assert_close(model(X / 2), expected)


def test_autocast():
    model = _attached(_model())
    expected = _run(model, "default")
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), activate(model, "default"):
        output = model(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    for parameter in lorica.adapters(model)["default"].parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


def test_inference_mode_and_vmap():
    model = _attached(_model())
    expected = _run(model, "default")
    with torch.inference_mode(), activate(model, "default"):
        assert torch.equal(model(X), expected)
    with activate(model, "default"), pytest.raises(RuntimeError, match=r"(vmap|setup_context)"):
        torch.vmap(model)(X)

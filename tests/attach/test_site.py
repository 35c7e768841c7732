"""The swapped class: what the module still is, how it is called, copied, moved and left."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.attach.activate import Activation, activate
from lorica.attach.plates import Route, Status, plates_of
from lorica.attach.site import Site, enter, is_site, leave, site_class
from lorica.errors import ActivationError, LoricaError, LoricaWarning
from lorica.methods.lora import LoRA

X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


def _layer(method: LoRA | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9))
    method = method or LoRA(r=3, target_modules=("0",), init_lora_weights="random")
    lorica.attach(model, method, name="a")
    return model


def _run(model: nn.Module, mixture, x: Tensor = X) -> Tensor:
    with torch.no_grad(), activate(model, mixture):
        return model(x)


def test_the_layer_is_what_it_was_to_everybody_else():
    layer = _layer()[0]
    assert isinstance(layer, nn.Linear) and is_site(layer) and isinstance(layer, Site)
    kind = type(layer)
    assert (kind.__name__, kind.__qualname__) == ("Linear", "Linear")
    assert kind.__module__ == nn.Linear.__module__
    assert repr(layer) == repr(nn.Linear(7, 9))
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]
    assert not list(layer.children()) and not list(layer.buffers())


def test_one_class_per_base_class():
    assert site_class(nn.Linear) is site_class(nn.Linear)
    assert site_class(nn.Linear) is not site_class(nn.Linear, ("weight",))
    assert type(_layer()[0]) is type(_layer()[0])


def test_arguments_by_name():
    model = _layer()
    expected = _run(model, "a")
    with torch.no_grad(), activate(model, "a"):
        assert torch.equal(model[0](input=X), expected)
    embedding = nn.Sequential(nn.Embedding(9, 5))
    lorica.attach(embedding, LoRA(r=2, target_modules=("0",), init_lora_weights="random"))
    ids = torch.tensor([[1, 3, 8]])
    with torch.no_grad(), activate(embedding, "default"):
        assert torch.equal(embedding[0](input=ids), embedding[0](ids))


def test_plain_data_on_the_plates():
    model = _layer()
    (plates,) = plates_of(model[0])
    assert plates.path == "0" and plates.layer.shape == "7 -> 9" and list(plates.slots) == ["a"]
    assert plates.acting() == []
    with activate(model, {"a": 0.5}):
        assert plates.acting() == ["a"] and plates.route.names == ("a",)
    assert plates_of(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_while_active_is_inactive_and_nobodys(copied):
    model = _layer()
    with activate(model, "a"):
        twin = copied(model)
        (plates,) = plates_of(twin[0])
        assert plates.route is None and plates.last is None and plates.recorded is None
        assert plates.status.owner is None and not plates.status.decided
        assert plates.status is twin.__dict__["_lorica_attached"].status
    assert type(twin[0]) is type(model[0])
    assert torch.equal(_run(twin, "a"), _run(model, "a"))
    lorica.detach(twin, "a")
    assert type(twin[0]) is nn.Linear and is_site(model[0])


def test_a_shared_part_copied_alone_still_works():
    model = _layer()
    part = copy.deepcopy(model[0])
    with pytest.warns(LoricaWarning, match="none was activated"):
        assert is_site(part) and torch.equal(part(X), _run(model, None))


def test_a_dtype_moves_the_base_and_not_the_plates():
    model = _layer()
    adapter = lorica.adapters(model)["a"]
    before = [(id(p), p.data_ptr(), p.dtype) for p in adapter.parameters()]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        assert [(id(p), p.data_ptr(), p.dtype) for p in adapter.parameters()] == before
        assert _run(model, "a", X.to(dtype)).dtype == dtype


def test_on_the_meta_device_shapes_come_out():
    model = _layer()
    held = [p.detach().clone() for p in lorica.adapters(model)["a"].parameters()]
    model.to("meta")
    for mixture in ("a", {"a": 0.5}, None):
        assert _run(model, mixture, X.to("meta")).shape == (2, 5, 9)
    for parameter, value in zip(lorica.adapters(model)["a"].parameters(), held, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device here")
def test_the_plates_follow_to_another_device():
    model = _layer()
    adapter = lorica.adapters(model)["a"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    expected = _run(model, "a")
    model.to("cuda")
    assert all(p.is_cuda for p in adapter.parameters())
    assert optimizer.param_groups[0]["params"] == list(adapter.parameters())
    torch.testing.assert_close(_run(model, "a", X.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_several_segments_serve_rows_of_their_own():
    model = _layer()
    lorica.attach(
        model, LoRA(r=2, target_modules=("0",), init_lora_weights="random"), name="b", seed=1
    )
    x = X.flatten(0, 1).unsqueeze(0)
    route = Route(("a", "b"), segments=((0, 4, "a"), (4, 10, "b")))
    with torch.no_grad(), Activation(model, route):
        together = model(x)
        torch.testing.assert_close(together[:, :4], _alone(model, "a", x[:, :4]))
        torch.testing.assert_close(together[:, 4:], _alone(model, "b", x[:, 4:]))
        with pytest.raises(ActivationError, match=r"0: the segments cover 10 rows, but .* given 3"):
            model(x[:, :3])


def _alone(model: nn.Module, name: str, x: Tensor) -> Tensor:
    with activate(model, name):
        return model(x)


def test_dropout_draws_the_same_mask_in_a_repeated_pass():
    model = _layer(LoRA(r=3, target_modules=("0",), lora_dropout=0.5, init_lora_weights="random"))
    model.train()
    with torch.no_grad(), Activation(model, Route(("a",), dropout_seed=4)):
        assert torch.equal(model(X), model(X))
    with torch.no_grad(), activate(model, "a"):
        torch.manual_seed(1)
        one = model(X)
        assert not torch.equal(model(X), one)
        torch.manual_seed(1)
        assert torch.equal(model(X), one)


def test_a_read_weight_is_the_adapted_one_only_while_active():
    attention = nn.MultiheadAttention(6, 2)
    model = nn.ModuleDict({"attention": attention})
    bare = attention.out_proj.weight
    lorica.attach(model, LoRA(r=2, target_modules=("out_proj",), init_lora_weights="random"))
    assert attention.out_proj.weight is bare
    assert attention.out_proj.state_dict()["weight"].data_ptr() == bare.data_ptr()
    with activate(model, {"default": 0.5}):
        half = attention.out_proj.weight
    with activate(model, "default"):
        read = attention.out_proj.weight
        assert dict(attention.named_parameters())["out_proj.weight"] is bare
    torch.testing.assert_close(half - bare, (read - bare) / 2)
    assert read.requires_grad and not bare.requires_grad
    attention.out_proj.weight = nn.Parameter(torch.zeros(6, 6))  # assignment reaches the base
    with activate(model, "default"):
        torch.testing.assert_close(attention.out_proj.weight, read - bare)
    lorica.detach(model, "default")
    assert not attention.out_proj.weight.any()


def test_two_parameters_of_one_module():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 5, 4))
            self.down = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi,eio->b", x, self.up, self.down)

    model = nn.ModuleDict({"experts": Experts()})
    a = lorica.attach(model, LoRA(r=1, target_modules=("up",)), name="a")
    b = lorica.attach(model, LoRA(r=1, target_modules=("down",)), name="b")
    assert list(a.slots) == ["experts.up"] and list(b.slots) == ["experts.down"]
    assert [p.path for p in plates_of(model["experts"])] == ["experts.up", "experts.down"]
    lorica.detach(model, "a")
    assert is_site(model["experts"])
    lorica.detach(model, "b")
    assert type(model["experts"]) is Experts


def test_a_module_is_a_site_in_one_way_only():
    module = nn.Linear(4, 4)
    enter(module, "x", Status())
    with pytest.raises(LoricaError, match="another way"):
        enter(module, "x.weight", Status(), "weight")
    leave(module)
    assert type(module) is nn.Linear and "_lorica" not in module.__dict__


def test_a_class_with_its_own_way_to_be_copied_is_refused():
    class Odd(nn.Linear):
        def __reduce_ex__(self, protocol):
            return nn.Linear, (3, 3)

    model = nn.Sequential(Odd(3, 3))
    with pytest.raises(LoricaError, match=r"^0: Odd has a way of its own to be copied"):
        lorica.attach(model, LoRA(r=1, target_modules=("0",)))
    assert type(model[0]) is Odd and lorica.adapters(model) == {}

"""LoRA's settings and arithmetic; what every method must keep is in tests/contract."""

import math

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.attach.layers import describe
from lorica.errors import ConfigError
from lorica.methods.copy import Copy
from lorica.methods.lora import LoRA
from lorica.methods.method import Layer


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2.0),
        ({"r": 1, "lora_alpha": 0.5}, 0.5),
    ],
)
def test_scale(settings, scale):
    assert LoRA(**settings).scale == scale


def test_all_problems_are_in_one_error():
    with pytest.raises(ConfigError) as caught:
        LoRA(
            r=0,
            lora_alpha=-1,
            lora_dropout=1.0,
            rank_pattern={"q_proj": 0},
            alpha_pattern={"v_proj": math.nan},
            init_lora_weights="gausian",
        )
    text = str(caught.value)
    for part in (
        "r is 0",
        "lora_alpha is -1",
        "lora_dropout is 1.0",
        "rank_pattern['q_proj'] is 0",
        "alpha_pattern['v_proj'] is nan",
        "did you mean gaussian?",
    ):
        assert part in text
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("bad", [True, 2.5, "8", None])
def test_a_rank_that_is_no_whole_number(bad):
    with pytest.raises(ConfigError, match="r is"):
        LoRA(r=bad)


def test_lists_become_tuples_and_the_spellings_of_peft_are_understood():
    method = LoRA(
        target_modules=["b", "a"],
        exclude_modules="lm_head",
        modules_to_save=["head"],
        layers_to_transform=3,
        init_lora_weights=True,
    )
    assert method.target_modules == ("b", "a")
    assert method.exclude_modules == ("lm_head",) and method.modules_to_save == ("head",)
    assert method.layers_to_transform == (3,)
    assert method.init_lora_weights == "kaiming"
    assert LoRA(init_lora_weights=False).init_lora_weights == "random"
    assert LoRA(target_modules={"b", "a"}).target_modules == ("a", "b")
    assert LoRA(layers_to_transform=range(2)).layers_to_transform == (0, 1)


def test_the_settings_at_a_place():
    method = LoRA(r=8, lora_alpha=16, rank_pattern={"q_proj": 2}, alpha_pattern={"up*": 5})
    there = method.at("model.layers.0.self_attn.q_proj")
    assert (there.r, there.lora_alpha, there.scale) == (2, 16, 8.0)
    assert (method.at("mlp.up_proj").r, method.at("mlp.up_proj").lora_alpha) == (8, 5)
    assert method.at("o_proj").r == 8 and not there.rank_pattern


def test_ranks_differ_by_layer_after_attaching():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 8))
    method = LoRA(r=3, target_modules=("0", "1"), rank_pattern={"1": 5}, alpha_pattern={"0": 1.5})
    slots = lorica.attach(model, method).slots
    assert slots["0"].tensors["A"].shape == (3, 9) and slots["1"].tensors["B"].shape == (8, 5)
    assert slots["0"].method.scale == 0.5 and slots["1"].method.scale == 16 / 5
    with pytest.raises(ConfigError, match=r"rank_pattern.*'q_proj'"):
        lorica.attach(
            model, LoRA(r=3, target_modules=("0",), rank_pattern={"q_proj": 5}), name="other"
        )


LAYERS = {
    "linear": (nn.Linear(100, 60), (4, 100), (60, 4)),
    "embedding": (nn.Embedding(90, 50), (4, 90), (50, 4)),
    "conv1d": (nn.Conv1d(20, 30, 5), (4, 20, 5), (30, 4, 1)),
    "conv2d": (nn.Conv2d(20, 30, (3, 2), groups=2), (4, 20, 3, 2), (30, 2, 1, 1)),
}


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "random"])
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_and_spread_of_the_start(name, init):
    module, shape_A, shape_B = LAYERS[name]
    layer = describe(module)
    tensors = LoRA(r=4, init_lora_weights=init).start(layer, _generator())
    A, B = tensors["A"], tensors["B"]
    assert (tuple(A.shape), tuple(B.shape)) == (shape_A, shape_B)
    zero, filled = (A, B) if name == "embedding" else (B, A)
    assert zero.any() == (init == "random")
    if name == "embedding":
        assert 0.8 < float(filled.std()) < 1.2
    elif init == "gaussian":
        assert float(filled.std()) == pytest.approx(1 / 4, rel=0.2)
    else:
        bound = 1 / math.sqrt(math.prod(shape_A[1:]))
        assert 0.9 * bound < float(filled.abs().max()) <= bound
        assert float(filled.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_experts_have_factors_of_their_own():
    layer = Layer("experts", 7, 5, lambda: torch.zeros(3, 5, 7), num_experts=3)
    tensors = LoRA(r=2, init_lora_weights="random").start(layer, _generator())
    assert tensors["A"].shape == (3, 2, 7) and tensors["B"].shape == (3, 5, 2)
    delta = LoRA(r=2).delta(tensors, layer)
    for expert in range(3):
        expected = 8.0 * tensors["B"][expert] @ tensors["A"][expert]
        torch.testing.assert_close(delta[expert], expected)


@pytest.mark.parametrize(
    ("module", "r", "problem"),
    [
        (nn.Linear(9, 5), 6, "r=6 is more than the layer's own rank of at most 5"),
        (nn.Embedding(4, 9), 5, "at most 4"),
        (nn.Conv1d(3, 40, 5), 16, "at most 15"),
        (nn.Conv2d(6, 9, 3, groups=3), 4, "not a multiple of the convolution's 3 groups"),
        (nn.LayerNorm(9), 1, "needs a linear, embedding, convolution or experts layer"),
    ],
)
def test_what_does_not_fit_is_said(module, r, problem):
    problems = LoRA(r=r).problems(describe(module))
    assert len(problems) == 1 and problem in problems[0]


@pytest.mark.parametrize("module", [nn.Linear(9, 5), nn.Embedding(5, 9), nn.Conv1d(2, 9, 3)])
def test_the_highest_rank_that_fits_is_allowed(module):
    layer = describe(module)
    highest = min(layer.in_features * math.prod(layer.kernel_size), layer.out_features)
    assert LoRA(r=highest).problems(layer) == []


def test_merging_adds_in_float32_and_rounds_once():
    layer = describe(nn.Linear(40, 30))
    method = LoRA(r=4, init_lora_weights="random")
    tensors = method.start(layer, _generator())
    weight = layer.weight().bfloat16()
    exact = weight.double() + method.scale * tensors["B"].double() @ tensors["A"].double()
    merged = method.merged(weight, tensors, layer)
    assert isinstance(merged, Tensor) and merged.dtype == torch.bfloat16
    assert (merged != exact.bfloat16()).double().mean() < 0.001  # ties of a rounding in float32


def test_one_step_by_hand():
    """A 1 x 1 layer: y = w x + s b a x; one step of gradient descent on y^2 / 2."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    model[0].weight.data.fill_(0.5)
    adapter = lorica.attach(model, LoRA(r=1, lora_alpha=3, target_modules=("0",)))
    A, B = adapter.slots["0"].tensors["A"], adapter.slots["0"].tensors["B"]
    A.data, B.data = torch.tensor([[0.25]]).double(), torch.tensor([[-2.0]]).double()
    with lorica.activate(model, adapter):
        y = model(torch.tensor([[4.0]]).double())
        (y.square() / 2).sum().backward()
    assert y.item() == pytest.approx(0.5 * 4 + 3 * -2.0 * 0.25 * 4, abs=1e-12)
    assert A.grad is not None and B.grad is not None
    assert A.grad.item() == pytest.approx(y.item() * 3 * -2.0 * 4, abs=1e-12)
    assert B.grad.item() == pytest.approx(y.item() * 3 * 0.25 * 4, abs=1e-12)


def test_a_planted_update_is_found():
    torch.manual_seed(0)
    planted = torch.randn(6, 2) @ torch.randn(2, 9)
    model = nn.Sequential(nn.Linear(9, 6))
    target = planted + model[0].weight.detach()
    adapter = lorica.attach(model, LoRA(r=2, lora_alpha=2, target_modules=("0",)))
    optimizer = torch.optim.LBFGS(
        adapter.parameters(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    x = torch.randn(64, 9)
    wanted = x @ target.t() + model[0].bias.detach()

    def loss() -> Tensor:
        optimizer.zero_grad()
        with lorica.activate(model, adapter):
            value = (model(x) - wanted).square().mean()
            value.backward()
        return value

    optimizer.step(loss)
    tensors = adapter.slots["0"].tensors
    found = tensors["B"] @ tensors["A"]
    assert (found - planted).norm() < 1e-3 * planted.norm()


def test_copy_merges_to_itself_and_fits_anything():
    module = nn.LayerNorm(5)
    layer = describe(module)
    tensors = Copy().start(layer, _generator())
    assert tensors.keys() == {"weight", "bias"} and Copy().problems(layer) == []
    assert tensors["weight"].data_ptr() != module.weight.data_ptr()
    tensors["weight"] += 1
    merged = Copy().merged(module.weight.bfloat16(), tensors, layer)
    assert merged is not None and merged.dtype == torch.bfloat16
    assert torch.equal(merged.float(), torch.full((5,), 2.0))
    assert Copy().at("x") == Copy() and Copy().dropout == 0.0

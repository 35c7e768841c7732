"""Products with four-bit weights in Triton, against unpacking the weight first."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorica
from lorica.base.four_bit import FP4, NF4
from lorica.base.int8 import Int8
from lorica.base.quantize import quantize_model
from lorica.ops import packed as torch_path
from lorica.ops.packed import Packed
from lorica.ops.triton import four_bit
from lorica.ops.triton.choose import twin
from ops.triton.compare import HALVES, random

KINDS = [NF4(), FP4(), NF4(32), NF4(128, False), FP4(64, False), NF4(4096)]


def weight_of(kind, shape, device, *, seed=3) -> Packed:
    """Random numbers, a part of them zero, packed."""
    numbers = random(*shape, seed=seed).float()
    numbers[:, : shape[1] // 3] *= 0.01
    numbers[shape[0] // 2] = 0
    stored = {name: t.to(device) for name, t in kind.pack(numbers).items()}
    return Packed(shape, torch.bfloat16, stored, kind.unpack, kind.form())


def compared(x, weight, bias, transposed):
    """(the kernel's product, its error, that of torch), errors against float64."""
    numbers = weight.numbers(x.dtype)
    made = four_bit.multiplied(x, weight, bias, transposed=transposed)
    plain = x @ numbers if transposed else F.linear(x, numbers, bias)
    wide = [None if t is None else t.double() for t in (x, numbers, bias)]
    exact = wide[0] @ wide[1] if transposed else F.linear(*wide)
    assert made.shape == plain.shape and made.dtype == plain.dtype
    return made, (made.double() - exact).norm(), (plain.double() - exact).norm(), exact.norm()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.settings())
@pytest.mark.parametrize("transposed", [False, True])
def test_every_storage(kind, transposed, device):
    weight = weight_of(kind, (70, 192), device)
    x = random(33, 70 if transposed else 192).to(device, torch.bfloat16)
    _, error, allowed, size = compared(x, weight, None, transposed)
    assert error <= 1.5 * allowed + 1e-6 * size


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 33, 130])
@pytest.mark.parametrize("shape", [(5, 6), (127, 250), (64, 64), (250, 34)])
def test_ugly_shapes(shape, rows, transposed, dtype, device):
    weight = weight_of(NF4(), shape, device)
    x = random(rows, shape[0 if transposed else 1]).to(device, dtype)
    _, error, allowed, size = compared(x, weight, None, transposed)
    assert error <= 1.5 * allowed + 1e-6 * size


def test_more_dimensions_a_bias_and_inputs_that_are_not_contiguous(device):
    weight = weight_of(NF4(), (40, 66), device)
    bias = random(40, seed=9).to(device, torch.float16)
    x = random(66, 3, 5).to(device, torch.float16).permute(1, 2, 0)
    made, error, allowed, size = compared(x, weight, bias, False)
    assert made.shape == (3, 5, 40) and error <= 1.5 * allowed + 1e-6 * size
    assert four_bit.multiplied(x[:0], weight, bias).shape == (0, 5, 40)


def test_a_row_is_the_same_whatever_rows_lie_beside_it(device):
    weight = weight_of(NF4(), (70, 192), device)
    x = random(30, 192).to(device, torch.bfloat16)
    whole = four_bit.multiplied(x, weight)
    assert torch.equal(four_bit.multiplied(x[:16], weight), whole[:16])


# --- the choice -----------------------------------------------------------------------------------


def test_few_rows_are_multiplied_inside_and_many_after_unpacking(device):
    weight = weight_of(NF4(), (20, 64), device)

    def taken(rows):
        x = torch.zeros(rows, 64, dtype=torch.bfloat16, device=device)
        return four_bit.packed_product(x, weight) is not None

    assert taken(1) and taken(128) and not taken(512) and not taken(4096)
    inside, before = four_bit.costs(1)
    assert before > 5 * inside


def test_other_storages_are_unpacked(device):
    x = torch.zeros(2, 6, dtype=torch.bfloat16, device=device)
    stored = {name: t.to(device) for name, t in Int8().pack(torch.ones(4, 6)).items()}
    int8 = Packed((4, 6), torch.bfloat16, stored, Int8().unpack, Int8().form())
    assert four_bit.packed_product(x, int8) is None
    assert four_bit.packed_product(x[:, :5], weight_of(NF4(), (4, 5), device)) is None


@pytest.fixture
def asked(monkeypatch):
    """What the ops ask for, and whether it was multiplied inside."""
    found = []

    def noting(op, *tensors):
        answer = twin(op, *tensors)

        def call(*args, **how):
            made = None if answer is None else answer(*args, **how)
            found.append((op, made is not None))
            return made

        return call

    monkeypatch.setattr(torch_path, "twin", noting)
    return found


def model(device, dtype) -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(34, 70), nn.SiLU(), nn.Linear(70, 16, bias=False))
    quantize_model(found, "nf4")
    return found.to(device, dtype)


def step(device, dtype, rows):
    """Output and gradients of an adapter on a quantized model."""
    base = model(device, dtype)
    adapter = lorica.attach(
        base, lorica.LoRA(r=3, target_modules=("0", "2"), init_lora_weights="random"), name="a"
    )
    x = random(rows, 34).to(device, dtype).requires_grad_()
    with lorica.activate(base, "a"):
        out = base(x)
        out.float().square().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in adapter.parameters())]


def test_a_quantized_layer_trains_through_it(device, asked, monkeypatch):
    ours = step(device, torch.bfloat16, 21)
    assert asked == [("packed_product", True)] * 4  # forward and backward of two layers
    monkeypatch.setattr(torch_path, "twin", lambda *_: None)
    for mine, other in zip(ours, step(device, torch.bfloat16, 21), strict=True):
        assert (mine - other).norm() <= 0.01 * other.norm()


def test_without_an_adapter_and_without_gradients(device, asked):
    with torch.no_grad():
        model(device, torch.float16)(random(5, 34).to(device, torch.float16))
    assert asked == [("packed_product", True)] * 2


def test_float32_and_many_rows_are_unpacked_first(device, asked):
    step(device, torch.float32, 21)
    step(device, torch.bfloat16, 700)
    assert asked and not any(inside for _, inside in asked)

"""Norms, gates and rotations against their Semantics lines: values, gradients, bits, memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from exact.measured import threads
from lorica.ops.glu import ACTIVATIONS, gated
from lorica.ops.norm import rms_norm
from lorica.ops.rope import rotate

SHAPES = [(5, 8), (2, 3, 33), (1, 250), (7, 1, 12), (0, 6), (4, 128)]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * (offset + weight)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _activation(name: str):
    if name == "silu":
        return F.silu
    return lambda x: F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _pairs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict:
    """Name -> the function, its Semantics line, inputs that want gradients."""
    width = shape[-1]
    weight = _random(width, seed=3, dtype=dtype) + 1
    x, other = _random(*shape, dtype=dtype), _random(*shape, seed=1, dtype=dtype)
    pairs = {
        "norm": (lambda x: rms_norm(x, weight, 1e-6), lambda x: _norm(x, weight, 1e-6), (x,)),
        "norm around zero": (
            lambda x: rms_norm(x, weight, 1e-5, 1.0),
            lambda x: _norm(x, weight, 1e-5, 1.0),
            (x,),
        ),
    }
    for name in ACTIVATIONS:
        pairs[name] = (
            lambda a, b, n=name: gated(a, b, n),
            lambda a, b, n=name: _activation(n)(a) * b,
            (x, other),
        )
    if width % 2 == 0:
        cos, sin = _random(width, seed=4, dtype=dtype), _random(width, seed=5, dtype=dtype)
        pairs["rotation"] = (lambda x: rotate(x, cos, sin), lambda x: _turn(x, cos, sin), (x,))
    return pairs


NAMES = list(_pairs((2, 4)))


def _run(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    weight = _random(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for s in SHAPES for n in NAMES if n in _pairs(s)]
)
def test_each_is_its_semantics_line(name, shape):
    ours, plain, inputs = _pairs(shape)[name]
    for actual, expected in zip(_run(ours, inputs), _run(plain, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    ours, _, inputs = _pairs((3, 6))[name]
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(ours, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [96, 250, 1408])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_good_as_the_plain_path(name, dtype, width):
    """Error against float64: at most 1.5 times that of plain autograd in the same precision."""
    shape = (64, width)
    narrow, wide = _pairs(shape, dtype)[name], _pairs(shape, dtype)[name]
    exact = _exact(name, shape, dtype)
    ours, plain = _run(narrow[0], narrow[2]), _run(wide[1], wide[2])
    for a, b, t in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - t).norm() <= 1.5 * (b.double() - t).norm() + 1e-9 * t.norm()


def _exact(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """In float64, from the rounded inputs."""
    narrow = _pairs(shape, dtype)[name][2]
    weight = (_random(shape[-1], seed=3, dtype=dtype) + 1).double()
    cos, sin = (_random(shape[-1], seed=s, dtype=dtype).double() for s in (4, 5))
    line = {
        "norm": lambda x: _norm(x, weight, 1e-6),
        "norm around zero": lambda x: _norm(x, weight, 1e-5, 1.0),
        "rotation": lambda x: _turn(x, cos, sin),
        **{n: lambda a, b, n=n: _activation(n)(a) * b for n in ACTIVATIONS},
    }[name]
    leaves = [t.double().requires_grad_() for t in narrow]
    out = line(*leaves)
    own = _random(*out.shape, seed=9).to(dtype).double()
    return [out.detach(), *torch.autograd.grad((out * own).sum(), leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_bits_among_others(name):
    """Blocks of 32 rows, at the widths of a real model."""
    for width in (64, 250, 512):
        ours, _, inputs = _pairs((160, width), torch.float32)[name]
        whole = _run(ours, inputs)
        for start, end in ((0, 32), (32, 96), (96, 160)):
            parts = [t[start:end] for t in inputs]
            leaves = [t.clone().requires_grad_() for t in parts]
            out = ours(*leaves)
            own = _random(160, width, seed=9)[start:end].float()
            found = [out.detach(), *torch.autograd.grad((out * own).sum(), leaves)]
            for actual, expected in zip(found, whole, strict=True):
                assert torch.equal(actual, expected[start:end])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_have_the_bits_that_they_have_alone_with_any_number_of_threads(
    activation, dtype, number
):
    """What several threads leave over at the end of their shares is rounded otherwise: all rows at
    once have other bits with three threads and more, in float32. GELU by its tanh of these very
    numbers has so in bfloat16.
    """
    sizes = (32, 32, 64)
    gate, up = (_random(sum(sizes), 1000, seed=s, dtype=dtype) for s in (0, 1))
    gate[:, ::3] = gate[:, ::3] * 0.1 - 5
    with threads(number):
        whole = _run(lambda a, b: gated(a, b, activation, sizes=sizes), (gate, up))
        weights = _random(sum(sizes), 1000, seed=9).to(dtype)
        rows = (t.split(sizes) for t in (gate, up, weights, *whole))
        for own_gate, own_up, weight, *wanted in zip(*rows, strict=True):
            leaves = [t.clone().requires_grad_() for t in (own_gate, own_up)]
            out = gated(*leaves, activation)
            found = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_change_nothing_but_last_bits(activation):
    inputs = _random(5, 8), _random(5, 8, seed=1)
    whole = _run(lambda a, b: gated(a, b, activation), inputs)
    parts = _run(lambda a, b: gated(a, b, activation, sizes=(2, 3)), inputs)
    turned = _run(lambda a, b: gated(a.t(), b.t(), activation, sizes=(6, 2)).t(), inputs)
    for wanted, *others in zip(whole, parts, turned, strict=True):
        for found in others:
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_large_values_overflow_in_no_precision():
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    weight = torch.ones(64, dtype=torch.float16)
    assert torch.allclose(rms_norm(x, weight, 1e-6), torch.ones_like(x))


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_but_the_inputs(name):
    ours, _, inputs = _pairs((64, 96), torch.float32)[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours(*leaves)
    own = {t.data_ptr() for t in leaves}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) <= 64 + 2 * 96


@pytest.mark.parametrize("name", NAMES)
def test_transposed_inputs_and_gradients(name):
    ours, plain, inputs = _pairs((6, 8, 4), torch.float64)[name]
    turned = tuple(t.transpose(0, 1) for t in inputs)
    for actual, expected in zip(_run(ours, turned), _run(plain, turned), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_as_they_are(name):
    ours, _, inputs = _pairs((6, 8))[name]
    kept = [t.clone() for t in inputs]
    _run(ours, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))

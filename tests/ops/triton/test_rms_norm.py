"""RMSNorm in Triton against its formula, and against the module of transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorica.ops.triton.rms_norm import TILE, rms_norm
from ops.triton.compare import HALVES, as_right_as_plain, close_in_float32, random

SHAPES = [(1, 1), (1, 33), (3, 127), (7, 250), (2, 3, 16), (33, 5), (2, TILE + 3), (0, 5)]
EPS = 1e-5


def plain(x, weight):
    h = x.float() if x.dtype != torch.float64 else x
    return weight * (h * (h.square().mean(-1, True) + EPS).rsqrt()).to(x.dtype)


def twin(x, weight):
    return rms_norm(x, weight, EPS)


def inputs(shape, device, scale=1.0):
    return [random(*shape, scale=scale).to(device), random(shape[-1], seed=1).to(device)]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(shape, device):
    close_in_float32(twin, plain, inputs(shape, device), [0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(33, 127), (2, 3, 1030)])
def test_half_precision(shape, dtype, device):
    as_right_as_plain(twin, plain, inputs(shape, device), [0], dtype)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e10])
def test_small_and_large_values(scale, device):
    close_in_float32(
        lambda x, w: twin(x * scale, w),
        lambda x, w: plain(x * scale, w),
        inputs((5, 33), device),
        [0],
    )


def test_rows_of_zeros_give_zeros(device):
    x = torch.zeros(3, 33, device=device, requires_grad=True)
    y = rms_norm(x, torch.ones(33, device=device), EPS)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and torch.isfinite(gradient).all()


def test_half_precision_with_a_weight_in_float32(device):
    x, weight = random(5, 33).bfloat16().to(device), random(33, seed=1).float().to(device)
    y = rms_norm(x, weight, EPS)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain(x, weight), rtol=1e-2, atol=1e-2)


def test_the_numbers_of_transformers_llama(device):
    x, weight = (t.bfloat16() for t in inputs((7, 250), device))
    module = LlamaRMSNorm(250, EPS).to(x)
    module.weight.data.copy_(weight)
    with torch.no_grad():
        expected = module(x)
    ours = rms_norm(x, weight, EPS)
    assert (ours != expected).float().mean() < 0.01  # a rounding here and there


def test_strided_rows_and_swapped_strides(device):
    wide = random(5, 66).float().to(device)
    weight = random(33, seed=1).float().to(device)
    close_in_float32(
        lambda x, w: twin(x[:, 7:40], w), lambda x, w: plain(x[:, 7:40], w), [wide, weight], [0]
    )
    close_in_float32(
        lambda x, w: twin(x.mT, w),
        lambda x, w: plain(x.mT, w),
        [wide.view(66, 5)[:33], weight],
        [0],
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_weight_around_zero(dtype, device):
    """As Gemma's: 1 is added, and nothing is rounded before the product."""

    def gemma(x, weight):
        h = x if x.dtype == torch.float64 else x.float()
        w = weight.to(h.dtype)
        return (h * (h.square().mean(-1, True) + EPS).rsqrt() * (1 + w)).to(x.dtype)

    def offset(x, weight):
        return rms_norm(x, weight, EPS, 1.0)

    given = inputs((33, 127), device)
    if dtype == torch.float32:
        close_in_float32(offset, gemma, given, [0])
    else:
        as_right_as_plain(offset, gemma, given, [0], dtype)


def test_a_weight_that_trains_is_refused(device):
    x, weight = (t.float() for t in inputs((5, 33), device))
    with pytest.raises(AssertionError, match="not frozen"):
        rms_norm(x, weight.requires_grad_(), EPS)

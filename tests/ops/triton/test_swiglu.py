"""SwiGLU in Triton against silu(gate) * up."""

import pytest
import torch
from torch.nn import functional as F

from lorica.ops.triton.swiglu import swiglu
from ops.triton.compare import HALVES, as_right_as_plain, close_in_float32, random

SHAPES = [(1, 1), (1, 33), (3, 127), (7, 250), (2, 3, 1030), (33, 5), (0, 5)]


def plain(gate, up):
    return F.silu(gate) * up


def inputs(shape, device, scale=1.0):
    return [random(*shape, seed=i, scale=scale).to(device) for i in range(2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape, device):
    close_in_float32(swiglu, plain, inputs(shape, device), (0, 1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(33, 127), (2, 3, 1030)])
def test_half_precision(shape, dtype, device):
    as_right_as_plain(swiglu, plain, inputs(shape, device), (0, 1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values(dtype, device):
    given = [t.to(dtype) for t in inputs((5, 33), device, scale=1e4)]
    torch.testing.assert_close(swiglu(*given), plain(*given), rtol=1e-5, atol=0)


def test_halves_of_one_tensor_and_swapped_strides(device):
    both = random(2, 5, 2 * 33).float().to(device)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up), plain(gate, up))
    close_in_float32(
        lambda b: swiglu(*b.chunk(2, -1)), lambda b: plain(*b.chunk(2, -1)), [both], [0]
    )
    close_in_float32(
        lambda a, b: swiglu(a.mT, b.mT),
        lambda a, b: plain(a.mT, b.mT),
        list(both.chunk(2, -1)),
        [0],
    )


def test_a_gradient_that_is_one_number_repeated(device):
    gate, up = (t.float().requires_grad_() for t in inputs((7, 33), device))
    theirs = torch.autograd.grad(plain(gate, up).sum(), (gate, up))
    for ours, other in zip(
        torch.autograd.grad(swiglu(gate, up).sum(), (gate, up)), theirs, strict=True
    ):
        torch.testing.assert_close(ours, other)


def test_overwriting_gives_the_same_gradients_in_the_memory_of_the_inputs(device):
    def outcome(overwrite):
        leaves = [t.float().requires_grad_() for t in inputs((7, 33), device)]
        gate, up = (t * 1 for t in leaves)
        y = swiglu(gate, up, overwrite=overwrite)
        y.square().sum().backward(retain_graph=True)
        return gate, y, [t.grad for t in leaves]

    gate, y, kept = outcome(False)
    assert torch.equal(gate, inputs((7, 33), device)[0].float())
    gate, y, overwritten = outcome(True)
    assert all(torch.equal(a, b) for a, b in zip(kept, overwritten, strict=True))
    assert torch.equal(gate, overwritten[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

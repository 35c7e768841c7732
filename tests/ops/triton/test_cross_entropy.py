"""The chunked loss of a frozen head in Triton against cross_entropy over whole logits."""

import pytest
import torch
from torch.nn import functional as F

from lorica.ops.triton.cross_entropy import linear_cross_entropy
from ops.triton.compare import HALVES, as_right_as_plain, close_in_float32, random

SHAPES = [(1, 1, 1), (1, 5, 33), (33, 7, 127), (70, 16, 250), (3, 5, 4099), (0, 5, 7)]
"""Rows, width, vocabulary."""


def plain(hidden, weight, targets, bias=None):
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


def inputs(shape, device, ignored=()):
    rows, width, vocabulary = shape
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    targets[list(ignored)] = -100
    hidden, weight = random(rows, width), random(vocabulary, width, seed=1)
    return [hidden.to(device), weight.to(device), targets.to(device)]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(shape, device):
    close_in_float32(linear_cross_entropy, plain, inputs(shape, device), [0])


def test_rows_without_a_label(device):
    given = inputs((33, 7, 127), device, ignored=[0, 5, 32])
    close_in_float32(linear_cross_entropy, plain, given, [0])


def test_no_label_at_all(device):
    hidden, weight, targets = inputs((5, 7, 33), device, ignored=range(5))
    hidden = hidden.float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight.float(), targets)
    loss.sum().backward()
    assert not loss.any() and not hidden.grad.any()


def test_a_bias(device):
    given = [*inputs((33, 7, 127), device), random(127, seed=4).to(device)]
    close_in_float32(linear_cross_entropy, plain, given, [0])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype, device):
    as_right_as_plain(linear_cross_entropy, plain, inputs((33, 16, 250), device), [0], dtype)


def test_large_logits_and_words_that_cannot_be(device):
    hidden, weight, targets = inputs((5, 7, 4099), device)
    bias = torch.zeros(4099, device=device)
    bias[:4097] = float("-inf")  # a whole block of the kernel
    targets = targets % 2 + 4097
    close_in_float32(linear_cross_entropy, plain, [hidden * 1e3, weight, targets, bias], [0])


def test_the_size_of_the_chunks_changes_nothing(device):
    hidden, weight, targets = inputs((70, 16, 127), device)
    found = []
    for rows in (32, 64, None):
        leaf = hidden.float().requires_grad_()
        loss = linear_cross_entropy(leaf, weight.float(), targets, rows=rows)
        found.append((loss, *torch.autograd.grad(loss.sum() * 0.5, leaf)))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-6, atol=1e-6)


def test_without_a_gradient(device):
    hidden, weight, targets = inputs((33, 7, 127), device)
    loss = linear_cross_entropy(hidden.float(), weight.float(), targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden.float(), weight.float(), targets))


def test_a_head_that_trains_is_refused(device):
    hidden, weight, targets = inputs((5, 7, 33), device)
    weight.requires_grad_()
    with pytest.raises(AssertionError, match="not frozen"):
        linear_cross_entropy(hidden.float(), weight.float(), targets)
    with torch.no_grad():
        assert linear_cross_entropy(hidden.float(), weight.float(), targets).all()

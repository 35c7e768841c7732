"""What a layer adds with another weight, against its Semantics lines."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorica.attach.layers import describe
from lorica.ops.weight import apply_conv, apply_embedding, apply_linear


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear():
    x, y, weight = _random(5, 3, 7), _random(5, 3, 11, seed=1), _random(11, 7, seed=2)
    torch.testing.assert_close(apply_linear(x, y, weight), y + x @ weight.T)


def test_embedding():
    ids, y, weight = torch.tensor([[3, 0], [22, 3]]), _random(2, 2, 9), _random(23, 9, seed=1)
    torch.testing.assert_close(apply_embedding(ids, y, weight, 3.0), y + weight[ids] * 3.0)
    assert torch.equal(F.embedding(ids, weight), weight[ids])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(5, 7, 4, padding=2, padding_mode="circular"),
        nn.Conv2d(6, 9, 3, groups=3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
    ],
)
def test_convolution(layer):
    layer = layer.double()
    x = _random(2, layer.in_channels, *[9] * len(layer.kernel_size))
    with torch.no_grad():
        y = layer(x)
        weight = _random(*layer.weight.shape, seed=3)
        added = apply_conv(x, y, weight, describe(layer).geometry)
        layer.weight += weight
        torch.testing.assert_close(added, layer(x))

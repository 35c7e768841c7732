"""What the other tests of this folder stand on: bfloat16 behaves as on a GPU."""

import torch
import triton
import triton.language as tl

from lorica.ops.triton.launch import launch
from ops.triton.compare import random


@triton.jit
def _copy(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < count)


@triton.jit
def _square(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile, input_precision="ieee"))


def test_float32_is_rounded_to_nearest_even(device):
    x = torch.cat([random(1000).float(), torch.tensor([1.00390625, 1.01171875, 1e38, 0.0])])
    x = torch.cat([x, torch.tensor([float("inf"), float("-inf"), float("nan")])]).to(device)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    launch(_copy, (1,), x, y, len(x), BLOCK=1024)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_matrices_are_multiplied_as_numbers(device):
    x = random(16, 16).bfloat16().to(device)
    y = torch.empty(16, 16, device=device)
    launch(_square, (1,), x, y, SIZE=16)
    torch.testing.assert_close(y, x.float() @ x.float(), rtol=1e-5, atol=1e-5)

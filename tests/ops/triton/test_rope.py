"""Rotary positions in Triton against the function of transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorica.ops.triton.rope import rotate
from ops.triton.compare import HALVES, as_right_as_plain, close_in_float32, random

SHAPES = [(1, 1, 1, 1, 2), (2, 3, 1, 5, 12), (1, 18, 5, 3, 66), (3, 2, 2, 3, 250)]
"""Batch, heads of queries and of keys, positions, width."""


def angles(batch, positions, width, device):
    """The cosines and sines of a model: both halves of a head have the same angles."""
    angle = random(batch, positions, width // 2, seed=2, scale=10).repeat(1, 1, 2)
    return [angle.cos().to(device), angle.sin().to(device)]


def inputs(shape, device, batch=1):
    n, heads, few, t, d = shape
    q, k = random(n, heads, t, d).to(device), random(n, few, t, d, seed=1).to(device)
    return [q, k, *angles(batch, t, d, device)]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape, device):
    close_in_float32(rotate, apply_rotary_pos_emb, inputs(shape, device), (0, 1))
    close_in_float32(rotate, apply_rotary_pos_emb, inputs(shape, device, shape[0]), (0, 1))


def test_halves_with_different_angles(device):
    given = inputs((2, 3, 1, 5, 12), device)
    given[2:] = [random(1, 5, 12, seed=i).to(device) for i in (8, 9)]
    close_in_float32(rotate, apply_rotary_pos_emb, given, (0, 1))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype, device):
    given = inputs((2, 4, 2, 7, 64), device)
    as_right_as_plain(rotate, apply_rotary_pos_emb, given, (0, 1), dtype)


def test_projections_as_a_model_makes_them(device):
    """(batch, positions, heads, width), seen with positions and heads swapped."""
    q, k, cos, sin = inputs((2, 5, 3, 7, 12), device)
    flat = [q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), cos, sin]

    def swapped(function):
        return lambda q, k, *a: function(q.transpose(1, 2), k.transpose(1, 2), *a)

    close_in_float32(swapped(rotate), swapped(apply_rotary_pos_emb), flat, (0, 1))
    q_out, _ = rotate(q := flat[0].transpose(1, 2), k, cos, sin)
    assert q_out.stride() == q.stride()


def test_turning_back_gives_the_input(device):
    q, k, cos, sin = (t.float() for t in inputs((2, 3, 1, 5, 12), device))
    again = rotate(*rotate(q, k, cos, sin), cos, -sin)
    torch.testing.assert_close(again[0], q)
    torch.testing.assert_close(again[1], k)

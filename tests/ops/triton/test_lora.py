"""The LoRA products in Triton against the torch path, kernel by kernel and as a whole."""

import pytest
import torch
from torch.nn import functional as F

from lorica.ops.lora import Segment
from lorica.ops.triton.lora import adapted_linear, lora_linear
from lorica.ops.triton.lora_kernels import (
    FUSED_RANK,
    HIGH,
    LOW,
    cut,
    expand,
    outer,
    per_segment,
    shrink,
)
from ops.triton.compare import HALVES, as_right_as_plain, close_in_float32, random

SPANS = {
    "one": ((0, 127),),
    "one in the midst": ((5, 120),),
    "two": ((0, 33), (33, 127)),
    "one row each": ((0, 1), (1, 2)),
    "gaps and none": ((2, 35), (35, 35), (40, 110), (120, 121)),
    "tiles that end in the midst": ((0, 64), (64, 193), (193, 200)),
}
RANKS = {
    "one": (5,),
    "one in the midst": (3,),
    "two": (1, 3),
    "one row each": (5, 12),
    "gaps and none": (5, 3, 12, 1),
}


def ranks_of(name):
    return RANKS.get(name, (12, 40, 5))


def plain_lora(x, y, segments):
    """The Semantics line, for autograd."""
    flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
    for s in segments:
        S = flat[s.start : s.end] @ s.A_RI.T
        S = S if s.gate is None else S * s.gate
        out[s.start : s.end] += (S @ s.B_OR.T) * (s.scale if s.gate is None else 1.0)
    return out.view(y.shape)


def factors(spans, ranks, widths, device):
    made = []
    for i, rank in enumerate(ranks):
        made.append((random(rank, widths[0], seed=10 + i) / widths[0] ** 0.5).to(device))
        made.append(random(widths[1], rank, seed=20 + i).to(device))
    return made


def gates_of(kind, spans, ranks, device):
    shapes = {"scale": None, "per rank": (), "per row": None}
    assert kind in shapes
    if kind == "scale":
        return [None for _ in ranks]
    sizes = [
        (r,) if kind == "per rank" else (b - a, r) for (a, b), r in zip(spans, ranks, strict=True)
    ]
    return [random(*size, seed=40 + i).to(device) for i, size in enumerate(sizes)]


def layer(function, spans, gates):
    """A function of x, y and the factors, as autograd sees it."""

    def call(x, y, *tensors):
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        segments = [
            Segment(*span, A, B, scale=0.5 + i, gate=None if gate is None else gate.to(y.dtype))
            for i, (span, gate, (A, B)) in enumerate(zip(spans, gates, pairs, strict=True))
        ]
        return function(x, y * 1, segments)

    return call


@pytest.mark.parametrize(
    ("name", "widths", "gate"),
    [
        ("one", (33, 250), "scale"),
        ("one in the midst", (127, 33), "per row"),
        ("two", (1030, 16), "scale"),
        ("one row each", (33, 127), "scale"),
        ("gaps and none", (127, 33), "scale"),
        ("gaps and none", (33, 127), "per rank"),
        ("gaps and none", (33, 127), "per row"),
        ("tiles that end in the midst", (33, 250), "per row"),
    ],
)
def test_value_and_gradients(name, widths, gate, device):
    spans, ranks = SPANS[name], ranks_of(name)
    rows, gates = spans[-1][1] + 3, gates_of(gate, spans, ranks, device)
    given = [random(rows, widths[0]).to(device), random(rows, widths[1], seed=1).to(device)]
    given += factors(spans, ranks, widths, device)
    twin, plain = (layer(f, spans, gates) for f in (lora_linear, plain_lora))
    close_in_float32(twin, plain, given, range(len(given)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["one", "gaps and none", "tiles that end in the midst"])
def test_half_precision(name, dtype, device):
    spans, ranks = SPANS[name], ranks_of(name)
    gates, rows = [None] * len(ranks), spans[-1][1]
    given = [random(rows, 127).to(device), random(rows, 33, seed=1).to(device)]
    given += factors(spans, ranks, (127, 33), device)
    twin, plain = (layer(f, spans, gates) for f in (lora_linear, plain_lora))
    as_right_as_plain(twin, plain, given, range(len(given)), dtype)


def test_factors_in_float32_under_a_base_in_bfloat16(device):
    spans, ranks = SPANS["two"], (1, 3)
    x, y = random(127, 33).bfloat16().to(device), random(127, 16, seed=1).bfloat16().to(device)
    tensors = [t.float().requires_grad_() for t in factors(spans, ranks, (33, 16), device)]
    layer(lora_linear, spans, [None, None])(x.requires_grad_(), y, *tensors).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in tensors)


def test_batches_and_strided_inputs(device):
    spans, ranks = ((0, 5), (5, 15)), (3, 5)
    given = [random(3, 33, 5).to(device), random(3, 5, 16, seed=1).to(device)]
    given += factors(spans, ranks, (33, 16), device)
    twin, plain = (layer(f, spans, [None, None]) for f in (lora_linear, plain_lora))
    close_in_float32(
        lambda x, *r: twin(x.mT, *r), lambda x, *r: plain(x.mT, *r), given, range(len(given))
    )


def test_beside_others_is_alone_bit_for_bit(device):
    """Another adapter's rows, and the place among them, change no bit of an adapter's."""
    ranks, widths = (5, 12), (127, 250)
    x, y = random(300, 127).float().to(device), random(300, 250, seed=1).float().to(device)
    tensors = [t.float() for t in factors(None, ranks, widths, device)]

    def outcome(spans, order):
        chosen = [tensors[2 * i + k].clone().requires_grad_() for i in order for k in (0, 1)]
        leaf = x.clone().requires_grad_()
        out = layer(lora_linear, spans, [None] * 2)(leaf, y, *chosen)
        out.square().sum().backward()
        return out.detach(), leaf.grad, [t.grad for t in chosen]

    # segment 0 over rows 70..270 in both; the other one before it, or without rows
    out, dx, (dA, dB, *_) = outcome(((70, 270), (0, 70)), (0, 1))
    alone = outcome(((70, 270), (300, 300)), (0, 1))
    assert torch.equal(out[70:270], alone[0][70:270]) and torch.equal(dx[70:270], alone[1][70:270])
    assert torch.equal(dA, alone[2][0]) and torch.equal(dB, alone[2][1])
    assert not alone[1][:70].any() and not alone[2][2].any() and not alone[2][3].any()


def test_frozen_factors_keep_no_input_and_get_no_gradient(device):
    spans, ranks = SPANS["two"], (1, 3)
    A, B, C, D = (t.float() for t in factors(spans, ranks, (33, 16), device))
    x = random(127, 33).float().to(device).requires_grad_()
    y = random(127, 16).float().to(device)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.shape) or t, lambda t: t
    ):
        out = layer(lora_linear, spans, [None, None])(x, y, A, B.requires_grad_(), C, D)
    out.sum().backward()
    assert x.shape not in sizes and A.grad is None and D.grad is None and B.grad.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["one in the midst", "gaps and none"])
def test_the_layer_in_the_same_function(name, bias, device):
    spans, ranks = SPANS[name], ranks_of(name)
    given = [random(127, 33).to(device), random(250, 33, seed=1).to(device)]
    given += [random(250, seed=2).to(device), *factors(spans, ranks, (33, 250), device)]

    def whole(x, weight, added, *tensors):
        pairs = zip(spans, tensors[::2], tensors[1::2], strict=True)
        segments = [Segment(*span, A, B, scale=0.5) for span, A, B in pairs]
        return adapted_linear(x, weight, added if bias else None, segments)

    def plain(x, weight, added, *tensors):
        pairs = zip(spans, tensors[::2], tensors[1::2], strict=True)
        segments = [Segment(*span, A, B, scale=0.5) for span, A, B in pairs]
        y = F.linear(x, weight, added if bias else None)
        return plain_lora(x, y, segments)

    close_in_float32(whole, plain, given, (0, *range(3, len(given))))


@pytest.mark.parametrize(("rows", "rank"), [(1, 3), (33, 1), (127, FUSED_RANK), (300, 12)])
def test_both_gradients_of_one_reading(rows, rank, device):
    g, B = random(rows, 250).float().to(device), random(250, rank, seed=1).float().to(device)
    S = random(rows, rank, seed=2).float().to(device)
    tiles, scale = cut(((0, rows),), (rank,), HIGH, device), per_segment((0.5,), device)
    dS, dB = shrink(g, B.t(), tiles, scale, S_TR=S, outer_scales=scale)
    torch.testing.assert_close(dS[:, :rank], 0.5 * g @ B, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dB[0, :rank], 0.5 * S.T @ g, rtol=1e-5, atol=1e-4)


def test_where_nothing_is_gained_torch_is_left_to_it(device):
    x, y = random(5, 33).float().to(device), random(5, 16).float().to(device)
    A, B = random(65, 33).float().to(device), random(16, 65).float().to(device).requires_grad_()
    narrow = Segment(0, 5, A[:3], B[:, :3])
    before = y.clone()
    assert lora_linear(x, y, [Segment(0, 2, A, B), Segment(2, 5, A, B)]) is None
    assert lora_linear(x, y, [Segment(0, 5, A, B)]) is None and lora_linear(x, y, []) is None
    with torch.no_grad():
        assert lora_linear(x, y, [narrow]) is None
    assert torch.equal(y, before)
    assert lora_linear(x, y, [narrow]) is not None


def test_the_kernels_by_themselves(device):
    spans, ranks = SPANS["gaps and none"], RANKS["gaps and none"]
    tiles = cut(spans, ranks, LOW, device)
    x = random(127, 250).float().to(device)
    stacked = random(sum(ranks), 250, seed=1).float().to(device)
    scales = per_segment((2.0, 1.0, 0.5, -1.0), device)
    down, _ = shrink(x, stacked, tiles, scales)
    along = outer(down, x, tiles, scales)
    y = random(127, 250, seed=2).float().to(device)
    added = y.clone()
    expand(down, stacked, added, tiles, scales, add=True)
    first = 0
    for i, ((a, b), rank) in enumerate(zip(spans, ranks, strict=True)):
        own, scale = stacked[first : first + rank], scales[i].item()
        expected = scale * x[a:b] @ own.T
        torch.testing.assert_close(down[a:b, :rank], expected, rtol=1e-5, atol=1e-4)
        assert not down[a:b, rank:].any()
        torch.testing.assert_close(
            along[i, :rank], scale * expected.T @ x[a:b], rtol=1e-4, atol=1e-2
        )
        sum_ = y[a:b] + scale * expected @ own
        torch.testing.assert_close(added[a:b], sum_, rtol=1e-4, atol=1e-3)
        first += rank
    assert torch.equal(added[35:40], y[35:40]) and torch.equal(added[110:120], y[110:120])

"""The products of LoRA against their Semantics lines, in value, gradient and bits."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.ops.lora import Segment, adapted_linear, lora_conv, lora_embedding, lora_linear

I, O, R = 507, 123, 7  # noqa: E741
GATES = ["scale", "per-rank", "per-row"]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _segment(
    start: int = 0,
    end: int | None = None,
    *,
    r: int = R,
    seed: int = 0,
    gate: str = "scale",
    rows: int = 0,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int] = (I, O),
) -> Segment:
    given = {
        "scale": None,
        "per-rank": _random(r, seed=seed + 70, dtype=dtype),
        "per-row": _random(rows, r, seed=seed + 80, dtype=dtype),
    }[gate]
    A = _random(r, sizes[0], seed=seed + 50, dtype=dtype) / sizes[0] ** 0.5
    B = _random(sizes[1], r, seed=seed + 60, dtype=dtype)
    return Segment(start, end, A, B, scale=1.75 if given is None else 1.0, gate=given)


def _semantics(x: Tensor, y: Tensor, segments: list[Segment]) -> Tensor:
    """The Semantics line, word for word, on a copy."""
    shape = y.shape
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
    for s in segments:
        gate = s.scale if s.gate is None else s.gate
        part = y[s.start : s.end] + ((x[s.start : s.end] @ s.A_RI.T) * gate) @ s.B_OR.T
        y = torch.cat([y[: s.start], part, y[y.shape[0] if s.end is None else s.end :]])
    return y.view(shape)


def _zipf(rows: int, gate: str = "scale", dtype: torch.dtype = torch.float64) -> list[Segment]:
    """Segments of sizes 66, 33, 22, 0, 11, 1 over 133 rows, of different ranks."""
    sizes, segments, start = (66, 33, 22, 0, 11, 1), [], 0
    for number, size in enumerate(sizes):
        r = (5, 8, 3, 4, 1, 16)[number]
        segments.append(
            _segment(start, start + size, r=r, seed=number, gate=gate, rows=size, dtype=dtype)
        )
        start += size
    assert start == rows
    return segments


def _leaves(segments: list[Segment]) -> tuple[list[Segment], list[Tensor]]:
    """The same segments over fresh leaves that want gradients."""
    made, leaves = [], []
    for s in segments:
        A, B = s.A_RI.clone().requires_grad_(), s.B_OR.clone().requires_grad_()
        made.append(Segment(s.start, s.end, A, B, s.scale, s.gate))
        leaves += [A, B]
    return made, leaves


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(133,), (19, 7), (1, 133), (7, 19, 1), (1,), ()])
def test_it_is_its_semantics_line(shape, gate):
    x, y = _random(*shape, I), _random(*shape, O, seed=1)
    rows = x.shape[:-1].numel()
    segments = [_segment(gate=gate, rows=rows)]
    expected = _semantics(x, y, segments)
    with torch.no_grad():
        plain = lora_linear(x, y.clone(), segments)
    recorded = lora_linear(x, y.clone(), segments)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)
    assert torch.equal(recorded, plain)


@pytest.mark.parametrize("gate", GATES)
def test_segments_of_zipf_sizes_and_ranks(gate):
    x, y = _random(19, 7, I), _random(19, 7, O, seed=1)
    segments = _zipf(133, gate)
    expected = _semantics(x, y, segments)
    torch.testing.assert_close(lora_linear(x, y.clone(), segments), expected, rtol=0, atol=1e-12)


def test_rows_outside_all_segments_keep_their_bits():
    x, y = _random(252, I), _random(252, O, seed=1)
    output = lora_linear(x, y.clone(), [_segment(32, 64), _segment(96, 97, seed=4)])
    outside = [*range(32), *range(64, 96), *range(97, 252)]
    assert torch.equal(output[outside], y[outside])
    assert not torch.equal(output[32:64], y[32:64]) and not torch.equal(output[96], y[96])


def test_no_segments_and_no_rows():
    x, y = _random(5, I), _random(5, O)
    assert torch.equal(lora_linear(x, y.clone(), []), y)
    assert lora_linear(x[:0], y[:0].clone(), [_segment()]).shape == (0, O)


def _numpy(x: Tensor, y: Tensor, segments: list[Segment]) -> np.ndarray:
    """By loops and in float64: shares no code with torch's matrix products."""
    result = y.numpy().astype(np.float64).copy()
    x_TI = x.numpy().astype(np.float64)
    for s in segments:
        A, B = s.A_RI.numpy().astype(np.float64), s.B_OR.numpy().astype(np.float64)
        for row in range(s.start, x.shape[0] if s.end is None else s.end):
            projected = np.array([np.dot(A[rank], x_TI[row]) for rank in range(A.shape[0])])
            gate = s.scale if s.gate is None else s.gate.numpy()
            if np.ndim(gate) == 2:
                gate = gate[row - s.start]
            result[row] += B @ (projected * gate)
    return result


@pytest.mark.parametrize("gate", GATES)
def test_a_numpy_oracle_in_float64(gate):
    x, y, segments = _random(133, I), _random(133, O, seed=1), _zipf(133, gate)
    expected = _numpy(x, y, segments)
    actual = lora_linear(x, y.clone(), segments).numpy()
    assert np.abs(actual - expected).max() < 1e-12


# --- gradients ------------------------------------------------------------------------------------


def _gradients(function, x: Tensor, y: Tensor, segments: list[Segment]) -> list[Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    segments, leaves = _leaves(segments)
    output = function(x, y * 1, segments)
    (output * _random(*output.shape, seed=9, dtype=output.dtype)).sum().backward()
    return [t.grad for t in (x, y, *leaves)]


@pytest.mark.parametrize("gate", GATES)
def test_gradients_equal_plain_autograd(gate):
    x, y = _random(133, I, dtype=torch.float32), _random(133, O, seed=1, dtype=torch.float32)
    segments = _zipf(133, gate, dtype=torch.float32)
    ours = _gradients(lora_linear, x, y, segments)
    plain = _gradients(_semantics, x, y, segments)
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        relative = (actual - expected).norm() / expected.norm().clamp(min=1e-9)
        assert relative < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck_in_float64(gate):
    sizes = {"dtype": torch.float64, "sizes": (5, 4)}
    segments = [
        _segment(0, 3, r=2, gate=gate, rows=3, **sizes),
        _segment(3, 3, r=1, seed=1, gate=gate, rows=0, **sizes),
        _segment(4, None, r=3, seed=2, gate=gate, rows=2, **sizes),
    ]
    _, leaves = _leaves(segments)

    def call(x: Tensor, y: Tensor, *factors: Tensor) -> Tensor:
        made = [
            Segment(s.start, s.end, factors[2 * i], factors[2 * i + 1], s.scale, s.gate)
            for i, s in enumerate(segments)
        ]
        return lora_linear(x, y * 1, made)

    x, y = _random(2, 3, 5).requires_grad_(), _random(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, y, *leaves), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_is_as_good_as_the_plain_path(gate):
    """Error against float64, per tensor: at most 1.5 times that of plain autograd in bfloat16."""
    x, y = _random(133, I, dtype=torch.bfloat16), _random(133, O, seed=1, dtype=torch.bfloat16)
    segments = _zipf(133, gate, dtype=torch.bfloat16)
    exact = [
        Segment(
            s.start,
            s.end,
            s.A_RI.double(),
            s.B_OR.double(),
            s.scale,
            None if s.gate is None else s.gate.double(),
        )
        for s in segments
    ]
    true = [
        _semantics(x.double(), y.double(), exact),
        *_gradients_double(x, y, exact),
    ]
    ours = [lora_linear(x, y.clone(), segments), *_gradients(lora_linear, x, y, segments)]
    plain = [_semantics(x, y, segments), *_gradients(_semantics, x, y, segments)]
    for a, b, t in zip(ours, plain, true, strict=True):
        assert a.dtype == torch.bfloat16
        own, other = (a.double() - t).norm(), (b.double() - t).norm()
        assert own <= 1.5 * other + 1e-9 * t.norm()


def _gradients_double(x: Tensor, y: Tensor, segments: list[Segment]) -> list[Tensor]:
    """With the output's gradient rounded as `_gradients` does in bfloat16."""
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    segments, leaves = _leaves(segments)
    output = _semantics(x, y, segments)
    (output * _random(*output.shape, seed=9, dtype=torch.bfloat16).double()).sum().backward()
    return [t.grad for t in (x, y, *leaves)]


def test_float32_factors_under_a_bfloat16_base():
    x, y = _random(31, I, dtype=torch.bfloat16), _random(31, O, dtype=torch.bfloat16)
    segments, leaves = _leaves([_segment(dtype=torch.float32)])
    output = lora_linear(x, y, segments)
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_whatever_the_layer_returned(dtype):
    """A layer may leave autocast, as quantized ones do: x and y then have any dtype."""
    x = _random(31, I, dtype=torch.float32).requires_grad_()
    y = _random(31, O, dtype=dtype)
    segments, leaves = _leaves([_segment(dtype=torch.float32)])
    expected = _semantics(x.double(), y.double(), [_segment()])
    with torch.autocast("cpu", torch.bfloat16):
        output = lora_linear(x, y.clone(), segments)
        output.float().square().mean().backward()
        with torch.no_grad():
            assert torch.equal(lora_linear(x, y.clone(), segments), output)
    assert output.dtype == dtype
    assert (output.double() - expected).norm() < 0.02 * expected.norm()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, *leaves))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "A and B", "x and y", "all but y"])
def test_only_what_is_wanted_gets_a_gradient(frozen):
    wants = {
        "x": (False, True, True, True),
        "A": (True, True, False, True),
        "B": (True, True, True, False),
        "A and B": (True, True, False, False),
        "x and y": (False, False, True, True),
        "all but y": (False, True, False, False),
    }[frozen]
    s = _segment()
    x, y, A, B = (
        t.clone().requires_grad_(want)
        for t, want in zip((_random(133, I), _random(133, O), s.A_RI, s.B_OR), wants, strict=True)
    )
    lora_linear(x, y * 1, [Segment(0, None, A, B, s.scale)]).square().sum().backward()
    full = _random(133, I).requires_grad_(), _random(133, O).requires_grad_()
    segments, leaves = _leaves([s])
    _semantics(*full, segments).square().sum().backward()
    for tensor, reference, want in zip((x, y, A, B), (*full, *leaves), wants, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-10, atol=1e-10)


def test_nothing_that_wants_a_gradient():
    output = lora_linear(_random(3, I), _random(3, O), [_segment()])
    assert not output.requires_grad


def test_double_backward_is_refused():
    segments, _ = _leaves([_segment()])
    x = _random(4, I).requires_grad_()
    output = lora_linear(x, _random(4, O), segments)
    (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
        first.sum().backward()


# --- memory ---------------------------------------------------------------------------------------


def _layouts(width: int) -> dict[str, Tensor]:
    return {
        "transposed": _random(width, 6).t(),
        "sliced": _random(6, 2 * width)[:, ::2],
        "offset": _random(7, width)[1:],
        "expanded": _random(1, width).expand(6, width),
        "permuted": _random(3, width, 2).permute(0, 2, 1).reshape(6, width),
    }


@pytest.mark.parametrize("layout", _layouts(1))
@pytest.mark.parametrize("recorded", [True, False])
def test_odd_layouts_of_x_and_y(layout, recorded):
    s = _segment()
    x, y = _layouts(I)[layout], _layouts(O)[layout]
    expected = _semantics(x, y, [s])
    with torch.set_grad_enabled(recorded):
        output = lora_linear(x, y.clone(memory_format=torch.preserve_format), [s])
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(lora_linear(x, y, [s]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_plain_y_is_overwritten_and_nothing_else_is(recorded):
    s, x, y = _segment(), _random(6, I), _random(6, O)
    expanded = _random(1, O).expand(6, O)
    strided = _random(O, 6).t()
    leaf = _random(6, O).requires_grad_()
    kept = [t.detach().clone() for t in (x, expanded, strided, leaf, s.A_RI, s.B_OR)]
    with torch.set_grad_enabled(recorded):
        assert lora_linear(x, y, [s]).data_ptr() == y.data_ptr()
        for other in (expanded, strided, leaf):
            lora_linear(x, other, [s])
    for tensor, before in zip((x, expanded, strided, leaf, s.A_RI, s.B_OR), kept, strict=True):
        assert torch.equal(tensor, before)


def test_a_leaf_y_that_trains_gets_its_gradient():
    leaf = _random(6, O).requires_grad_()
    lora_linear(_random(6, I), leaf, [_segment()]).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones_like(leaf))


def test_nothing_of_the_size_of_the_output_is_saved():
    saved = []
    x = _random(64, I, dtype=torch.float32).requires_grad_()
    y = _random(64, O, dtype=torch.float32)
    segments, _ = _leaves([_segment(dtype=torch.float32)])

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, y, segments)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)  # by reference
    assert all(t.shape != (64, O) for t in saved)
    extra = sum(t.numel() for t in saved if 64 in t.shape) - x.numel()
    assert extra == 64 * R


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(96, 72), (64, 128), (507, 123)])
def test_training_together_equals_training_alone_bit_for_bit(sizes, dtype):
    """Segments that start at multiples of 32 rows: outputs and all gradients."""
    lengths = (64, 32, 45, 96)
    starts = (0, 64, 96, 160)  # 45 rows, then 19 that are nobody's
    x = _random(256, sizes[0], dtype=dtype)
    y = _random(256, sizes[1], seed=1, dtype=dtype)
    weight = _random(256, sizes[1], seed=2, dtype=dtype)
    segments = [
        _segment(a, a + n, r=r, seed=i, dtype=torch.float32, sizes=sizes)
        for i, (a, n, r) in enumerate(zip(starts, lengths, (8, 3, 16, 7), strict=True))
    ]
    together, leaves = _leaves(segments)
    x_all = x.clone().requires_grad_()
    output = lora_linear(x_all, y.clone(), together)
    (output * weight).sum().backward()
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        rows = slice(start, start + length)
        (alone,), (A, B) = _leaves([segments[i]])
        x_own = x[rows].clone().requires_grad_()
        own = lora_linear(x_own, y[rows].clone(), [Segment(0, None, A, B, alone.scale)])
        (own * weight[rows]).sum().backward()
        assert torch.equal(own, output[rows])
        assert torch.equal(A.grad, leaves[2 * i].grad) and torch.equal(
            B.grad, leaves[2 * i + 1].grad
        )
        assert torch.equal(x_own.grad, x_all.grad[rows])


# --- the layer and its adapters in one ------------------------------------------------------------


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None, segments: list[Segment]) -> Tensor:
    """Its Semantics line."""
    return lora_linear(x, F.linear(x, weight, bias), segments)


def _layer(dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (I, O)) -> list[Tensor]:
    weight = _random(sizes[1], sizes[0], seed=30, dtype=dtype) / sizes[0] ** 0.5
    return [weight, _random(sizes[1], seed=31, dtype=dtype)]


def _run_whole(function, x: Tensor, layer: list, segments: list[Segment]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    made, leaves = _leaves(segments)
    output = function(x, *layer, made)
    (output * _random(*output.shape, seed=9, dtype=output.dtype)).sum().backward()
    return [output.detach(), *(t.grad for t in (x, *leaves))]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_layer_and_its_adapters_are_their_semantics_line(gate, biased):
    layer = _layer() if biased else [_layer()[0], None]
    x, segments = _random(19, 7, I), _zipf(133, gate)
    ours = _run_whole(adapted_linear, x, layer, segments)
    plain = _run_whole(_whole, x, layer, segments)
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(adapted_linear(x, *layer, segments), ours[0])


def test_rows_of_no_adapter_have_the_gradient_of_the_layer():
    layer, segments = _layer(), [_segment(32, 64), _segment(96, 97, seed=4)]
    ours = _run_whole(adapted_linear, _random(252, I), layer, segments)
    plain = _run_whole(_whole, _random(252, I), layer, segments)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-11, atol=1e-11)
    assert ours[1][200:].abs().min() > 0


def test_the_layer_and_its_adapters_in_gradcheck():
    sizes = {"dtype": torch.float64, "sizes": (5, 4)}
    segments = [_segment(0, 3, r=2, **sizes), _segment(4, None, r=3, seed=2, **sizes)]
    layer = _layer(sizes=(5, 4))
    _, leaves = _leaves(segments)

    def call(x: Tensor, *factors: Tensor) -> Tensor:
        made = [
            Segment(s.start, s.end, factors[2 * i], factors[2 * i + 1], s.scale)
            for i, s in enumerate(segments)
        ]
        return adapted_linear(x, *layer, made)

    x = _random(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *leaves), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_layer_is_as_good_as_the_plain_path(dtype):
    x, layer = _random(133, I, dtype=dtype), _layer(dtype)
    segments = _zipf(133, dtype=dtype)
    exact = [Segment(s.start, s.end, s.A_RI.double(), s.B_OR.double(), s.scale) for s in segments]
    weight = _random(133, O, seed=9, dtype=dtype).double()
    ours = _run_whole(adapted_linear, x, layer, segments)
    plain = _run_whole(lambda x, w, b, s: _semantics(x, F.linear(x, w, b), s), x, layer, segments)
    wide, (made, leaves) = x.double().requires_grad_(), _leaves(exact)
    true = _semantics(wide, F.linear(wide, *(t.double() for t in layer)), made)
    found = [true.detach(), *torch.autograd.grad((true * weight).sum(), [wide, *leaves])]
    for a, b, t in zip(ours, plain, found, strict=True):
        assert a.dtype == dtype
        own, other = (a.double() - t).norm(), (b.double() - t).norm()
        assert own <= 1.5 * other + 1e-7 * t.norm()


def test_what_needs_no_gradient_makes_none_and_keeps_nothing():
    segments, _ = _leaves([_segment()])
    x, saved = _random(133, I), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    weight, bias = _layer()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = adapted_linear(x, weight, bias, segments)
    assert all(t.data_ptr() != weight.data_ptr() for t in saved)  # only dx would read it
    output.sum().backward()
    assert x.grad is None and segments[0].A_RI.grad is not None
    frozen = adapted_linear(_random(3, I).requires_grad_(), weight, bias, [_segment()])
    frozen.sum().backward()


@pytest.mark.parametrize("sizes", [(96, 72), (64, 128), (507, 123)])
def test_the_whole_layer_together_equals_alone_bit_for_bit(sizes):
    layer = _layer(torch.float32, sizes)
    x = _random(256, sizes[0], dtype=torch.float32)
    starts, lengths = (0, 64, 96, 160), (64, 32, 64, 96)
    segments = [
        _segment(a, a + n, r=r, seed=i, dtype=torch.float32, sizes=sizes)
        for i, (a, n, r) in enumerate(zip(starts, lengths, (8, 3, 16, 7), strict=True))
    ]
    weight = _random(256, sizes[1], seed=2, dtype=torch.float32)
    together, leaves = _leaves(segments)
    x_all = x.clone().requires_grad_()
    output = adapted_linear(x_all, *layer, together)
    (output * weight).sum().backward()
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        rows = slice(start, start + length)
        (alone,), (A, B) = _leaves([segments[i]])
        x_own = x[rows].clone().requires_grad_()
        own = adapted_linear(x_own, *layer, [Segment(0, None, A, B, alone.scale)])
        (own * weight[rows]).sum().backward()
        assert torch.equal(own, output[rows]) and torch.equal(x_own.grad, x_all.grad[rows])
        assert torch.equal(A.grad, leaves[2 * i].grad)
        assert torch.equal(B.grad, leaves[2 * i + 1].grad)


# --- embeddings and convolutions ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.75, torch.tensor(1.75, dtype=torch.float64)])
def test_embedding_is_its_semantics_line(scale):
    ids = torch.randint(0, 29, (3, 5), generator=torch.Generator().manual_seed(1))
    y, A, B = _random(3, 5, 11), _random(4, 29, seed=1), _random(11, 4, seed=2)
    kept = y.clone()
    output = lora_embedding(ids, y, A, B, scale)
    expected = y + F.embedding(ids, A.T) @ B.T * scale
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    by_hand = y.numpy() + 1.75 * np.einsum("ro,bsr->bso", B.T.numpy(), A.numpy().T[ids.numpy()])
    assert np.abs(output.numpy() - by_hand).max() < 1e-12
    assert torch.equal(y, kept)
    assert torch.autograd.gradcheck(
        lambda y, A, B: lora_embedding(ids, y, A, B, 1.75),
        tuple(t.clone().requires_grad_() for t in (y, A, B)),
        atol=1e-8,
    )


def test_embedding_in_the_dtype_of_the_base():
    ids = torch.tensor([[1, 4]])
    output = lora_embedding(
        ids,
        _random(1, 2, 11, dtype=torch.bfloat16),
        _random(4, 29, dtype=torch.float32),
        _random(11, 4, dtype=torch.float32),
        2.0,
    )
    assert output.dtype == torch.bfloat16


CONVOLUTIONS = {
    "plain": nn.Conv1d(6, 9, 3),
    "strided": nn.Conv1d(6, 9, 4, stride=3, padding=2, dilation=2),
    "grouped": nn.Conv1d(6, 9, 3, padding=1, groups=3),
    "same": nn.Conv1d(6, 9, 4, padding="same", dilation=2),
    "circular": nn.Conv1d(6, 9, 3, padding=2, padding_mode="circular"),
    "2d": nn.Conv2d(6, 9, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2)),
    "2d-replicate": nn.Conv2d(6, 9, 3, padding=(2, 1), padding_mode="replicate"),
    "2d-grouped": nn.Conv2d(6, 9, 3, groups=3),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_its_semantics_line(name):
    """And, where it is not grouped, the convolution with the product of its factors."""
    layer = CONVOLUTIONS[name]
    flat = isinstance(layer, nn.Conv1d)
    x = _random(2, 6, 11) if flat else _random(2, 6, 7, 8)
    geometry = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
        "padding_amounts": layer._reversed_padding_repeated_twice,
    }
    A = _random(3, 6, *layer.kernel_size, seed=1)
    B = _random(9, 3 // layer.groups, *(1 for _ in layer.kernel_size), seed=2)
    same = {k: geometry[k] for k in ("stride", "padding", "dilation", "padding_mode")}
    kind = type(layer)
    inner = kind(6, 3, layer.kernel_size, bias=False, **same).double()
    outer = kind(3, 9, 1, bias=False, groups=layer.groups).double()
    inner.weight.data, outer.weight.data = A, B
    update = outer(inner(x)).detach() * 1.75
    y = _random(*update.shape, seed=3)
    kept = y.clone()
    output = lora_conv(x, y, A, B, 1.75, geometry)
    torch.testing.assert_close(output, y + update, rtol=0, atol=1e-12)
    assert torch.equal(y, kept)
    if layer.groups == 1:
        whole = kind(6, 9, layer.kernel_size, bias=False, **same).double()
        whole.weight.data = 1.75 * torch.einsum("or,ri...->oi...", B.flatten(1), A)
        torch.testing.assert_close(output - y, whole(x).detach(), rtol=0, atol=1e-11)
    alone = lora_conv(x[1], y[1], A, B, 1.75, geometry)  # a sample without a batch
    torch.testing.assert_close(alone, output[1], rtol=0, atol=1e-12)

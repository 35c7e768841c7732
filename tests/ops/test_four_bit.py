"""Bytes and numbers of four-bit weights, against the published vector and against bitsandbytes."""

import pytest
import torch

from lorica.ops import compiled, four_bit

GOLDEN = "000001111111122222333344455566677788999aaabbbccccddddeeeeeeeffff"
BOOKS = pytest.mark.parametrize("book", ["nf4", "fp4"])


def test_the_golden_vector():
    packed, absmax = four_bit.quantize(torch.arange(-32, 32) / 32, "nf4", 64)
    assert bytes(packed.flatten().tolist()).hex() == GOLDEN
    assert absmax.tolist() == [1.0]


@BOOKS
@pytest.mark.parametrize("shape", [(64, 128), (33, 70), (5, 7), (300, 1000)])
@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_bitsandbytes(book, shape, block, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    theirs, state = functional.quantize_4bit(
        weight, quant_type=book, blocksize=block, compress_statistics=True
    )
    packed, absmax = four_bit.quantize(weight, book, block)
    places, scales, offset = four_bit.compress(absmax)
    assert torch.equal(packed, theirs)
    assert torch.equal(places, state.absmax)
    assert torch.equal(scales, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    own = four_bit.expand(places, scales, offset)
    there = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(own, there)
    for out_dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(shape, dtype=out_dtype)
        four_bit.dequantize(packed, own, book, block, out)
        values = four_bit.book_values(book, torch.device("cpu"))
        exact = _by_hand(packed, own, values, block, shape)
        assert torch.equal(out, exact.to(out_dtype))


def _by_hand(packed, absmax, values, block, shape):
    bytes_ = packed.flatten().int()
    places = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()
    number = torch.Size(shape).numel()
    scales = absmax.repeat_interleave(block)[:number]
    return (values[places[:number].long()] * scales).view(shape)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@BOOKS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 128, 1024])
@pytest.mark.parametrize("shape", [(16, 64), (160, 160), (3, 1024), (129, 1000), (1024, 1408)])
def test_the_compiled_kernel_and_the_table_give_the_same_bits(book, dtype, block, shape):
    torch.manual_seed(2)
    packed, absmax = four_bit.quantize(torch.randn(shape) * 0.02, book, block)
    made, right = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    four_bit.dequantize(packed, absmax, book, block, made)
    four_bit._by_table(packed, absmax, book, block, right)
    assert torch.equal(made, right)


@pytest.fixture
def untried():
    four_bit._tried.cache_clear()
    compiled._library.cache_clear()
    yield
    four_bit._tried.cache_clear()
    compiled._library.cache_clear()


def test_the_kernel_is_called_where_it_can_be(monkeypatch, untried):
    calls = []

    def kernel_of(book, dtype):
        def unpack(packed, absmax, block, out):
            calls.append(out.shape)
            four_bit._by_table(packed, absmax, book, block, out)

        return unpack

    monkeypatch.setattr(four_bit, "kernel_of", kernel_of)
    packed, absmax = four_bit.quantize(torch.randn(6, 64), "nf4", 64)
    four_bit.dequantize(packed, absmax, "nf4", 64, torch.empty(6, 64))
    assert calls == [(512,), (6, 64)]  # the trial first
    packed, absmax = four_bit.quantize(torch.randn(3, 50), "nf4", 64)  # the last block is shorter
    four_bit.dequantize(packed, absmax, "nf4", 64, torch.empty(3, 50))
    assert len(calls) == 2


def test_a_kernel_that_gives_other_bits_is_left_alone(monkeypatch, untried):
    monkeypatch.setattr(four_bit, "kernel_of", lambda *_: lambda *given: given[3].zero_())
    packed, absmax = four_bit.quantize(torch.randn(6, 64), "nf4", 64)
    made, right = torch.empty(6, 64), torch.empty(6, 64)
    four_bit.dequantize(packed, absmax, "nf4", 64, made)
    assert torch.equal(made, four_bit._by_table(packed, absmax, "nf4", 64, right))


def test_the_trial_is_made_in_memory_of_the_cpu_whatever_the_defaults(untried):
    packed, absmax = four_bit.quantize(torch.randn(6, 64), "nf4", 64)
    made, right = torch.empty(6, 64), torch.empty(6, 64)
    with torch.device("meta"):
        four_bit.dequantize(packed, absmax, "nf4", 64, made)
    assert torch.equal(made, four_bit._by_table(packed, absmax, "nf4", 64, right))
    found = four_bit._tried("nf4", torch.float32)
    four_bit._tried.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = four_bit._tried("nf4", torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (again is None) == (found is None)


def test_tensors_of_other_types_do_not_go_to_the_kernel(monkeypatch, untried):
    packed, absmax = four_bit.quantize(torch.randn(6, 64), "nf4", 64)
    out = torch.empty(6, 64)
    assert four_bit._whole(packed, absmax, 64, out)
    assert not four_bit._whole(packed, absmax.half(), 64, out)
    assert not four_bit._whole(packed.int(), absmax, 64, out)
    assert not four_bit._whole(packed, absmax, 64, out.t())
    assert not four_bit._whole(packed, absmax, 64, out[:5, :63])
    assert not four_bit._whole(packed, absmax, 64, torch.empty(6, 64, device="meta"))


def test_versions_that_were_not_tested_are_left_alone(monkeypatch, untried):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.51.0")
    assert compiled.kernel_of("nf4", torch.float32) is None
    monkeypatch.undo()
    compiled._library.cache_clear()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert compiled.kernel_of("nf4", torch.float32) is None


def test_many_scales_are_rounded_as_bitsandbytes_rounds_them():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    absmax = torch.rand(300_000) + 1
    places, _, mean = four_bit.compress(absmax)  # theirs depends on the number of threads
    assert abs(mean - absmax.double().mean()) < 1e-6
    theirs, _ = functional.quantize_blockwise(absmax - mean, blocksize=256)
    assert torch.equal(places, theirs)


@BOOKS
def test_blocks_of_zeros_stay_zeros(book):
    weight = torch.zeros(4, 96)
    weight[0, :5] = 1.5
    packed, absmax = four_bit.quantize(weight, book, 64)
    out = four_bit.dequantize(packed, absmax, book, 64, torch.full_like(weight, 9))
    assert torch.equal(out, weight)


@BOOKS
def test_quantizing_again_changes_nothing(book):
    torch.manual_seed(2)
    packed, absmax = four_bit.quantize(torch.randn(40, 64), book, 64)
    numbers = four_bit.dequantize(packed, absmax, book, 64, torch.empty(40, 64))
    again, scales = four_bit.quantize(numbers, book, 64)
    assert torch.equal(scales, absmax)
    assert torch.equal(four_bit.dequantize(again, scales, book, 64, torch.empty(40, 64)), numbers)


def test_nf4_loses_nine_percent_of_normal_numbers():
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    packed, absmax = four_bit.quantize(weight, "nf4", 64)
    out = four_bit.dequantize(packed, absmax, "nf4", 64, torch.empty_like(weight))
    assert float((out - weight).norm() / weight.norm()) == pytest.approx(0.092, abs=0.002)

"""Numbers in 8 bits against a float64 oracle."""

import hashlib

import pytest
import torch

from lorica.ops.blockwise import BLOCK, dequantize_blockwise, dynamic_map, quantize_blockwise

SIGNED, POSITIVE = dynamic_map(signed=True), dynamic_map(signed=False)


def test_the_signed_map_is_that_of_bitsandbytes():
    """Its digest was taken from bitsandbytes' own map (the second level of NF4 uses it too)."""
    digest = hashlib.sha256(SIGNED.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def test_the_positive_map_has_twice_the_values_in_each_decade():
    assert POSITIVE.shape == (256,) and (POSITIVE.diff() > 0).all()
    assert POSITIVE[0] == 0 and POSITIVE[-1] == 1
    for i in range(7):
        inside = (10.0 ** (i - 7) < POSITIVE) & (10.0 ** (i - 6) > POSITIVE)
        assert inside.sum() == 2 ** (i + 1)


def oracle(x, code):
    """Nearest values in float64, and how far the runner-up of each is behind."""
    flat = x.double().reshape(-1)
    places = []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = block.abs().max()
        scaled = block / scale if scale > 0 else block
        distance, place = (code.double() - scaled[:, None]).abs().sort(dim=1, stable=True)
        lead = distance[:, 1] - distance[:, 0]
        places += zip(place[:, 0].tolist(), lead.tolist(), strict=True)
    return places


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 7, 41), (40, 127)], ids=str)
def test_places_are_the_nearest_ones(shape, signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4
    x = x if signed else x.abs()
    code = SIGNED if signed else POSITIVE
    found, scales = quantize_blockwise(x, code)
    assert found.shape == x.shape and found.dtype == torch.uint8
    assert scales.shape == (-(-x.numel() // BLOCK),)
    for value, place, (nearest, lead) in zip(
        x.flatten().tolist(), found.flatten().tolist(), oracle(x, code), strict=True
    ):
        kept = max(nearest, 1) if not signed and value > 0 else nearest
        assert place == kept or lead < 1e-7
    back = dequantize_blockwise(found, scales, code)
    assert back.dtype == torch.float32
    values = scales.repeat_interleave(BLOCK)[: x.numel()].view(shape) * code[found.int()]
    assert torch.equal(back, values)


def test_what_was_read_out_is_written_to_the_same_places():
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    first = quantize_blockwise(x, SIGNED)
    again = quantize_blockwise(dequantize_blockwise(*first, SIGNED), SIGNED)
    # The largest magnitude of a block may be negative, and -1 is no value of the code.
    assert (first[0].int() - again[0].int()).abs().max() <= 1


def test_blocks_of_zeros():
    for code in (SIGNED, POSITIVE):
        places, scales = quantize_blockwise(torch.zeros(300), code)
        assert (scales == 0).all()
        assert (code[places.int()] == 0).all()
        assert (dequantize_blockwise(places, scales, code) == 0).all()


def test_a_second_moment_above_zero_stays_above_zero():
    x = torch.tensor([1.0, 1e-12, 0.0])
    back = dequantize_blockwise(*quantize_blockwise(x, POSITIVE), POSITIVE)
    assert back[0] == 1 and 0 < back[1] < 1e-6 and back[2] == 0


def test_strides_do_not_matter():
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    one, other = quantize_blockwise(x.t(), SIGNED), quantize_blockwise(x.t().contiguous(), SIGNED)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

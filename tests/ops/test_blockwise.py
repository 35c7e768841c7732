"""Numbers in 8 bits against a float64 oracle."""

import hashlib

import pytest
import torch

from lorica.ops.blockwise import BLOCK, blocks_of, dequantize, dynamic_code, quantize

SIGNED, POSITIVE = dynamic_code(signed=True), dynamic_code(signed=False)


def test_the_signed_map_is_that_of_bitsandbytes():
    """Its digest was taken from bitsandbytes' own map (the second level of NF4 uses it too)."""
    digest = hashlib.sha256(SIGNED.values.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def test_the_positive_map_has_twice_the_values_in_each_decade():
    values = POSITIVE.values
    assert values.shape == (256,) and (values.diff() > 0).all()
    assert values[0] == 0 and values[-1] == 1
    for i in range(7):
        inside = (values > 10.0 ** (i - 7)) & (values < 10.0 ** (i - 6))
        assert inside.sum() == 2 ** (i + 1)


@pytest.mark.parametrize("code", [SIGNED, POSITIVE], ids=["signed", "positive"])
def test_the_table_finds_what_a_search_finds(code):
    """Of random numbers of all magnitudes, and of every border and its neighbours."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-9 * torch.rand(20_000, generator=generator))
    borders = code.borders[:-1]
    near = [torch.nextafter(borders, torch.full_like(borders, end)) for end in (-2.0, 2.0)]
    x = torch.cat([size, -size, borders, *near, code.values, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    wanted = torch.bucketize(x, borders, out_int32=True)
    assert torch.equal(code.places(x), wanted)
    distance = (code.values.double()[wanted.int()] - x.double()).abs()
    assert (distance <= (code.values.double() - x.double()[:, None]).abs().amin(1) + 1e-7).all()


def oracle(x, code):
    """Nearest values in float64, and how far the runner-up of each is behind."""
    flat = x.double().reshape(-1)
    places = []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = block.abs().max()
        scaled = block / scale if scale > 0 else block
        distance, place = (code.values.double() - scaled[:, None]).abs().sort(dim=1, stable=True)
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
    blocks = blocks_of(x)
    found, scales = quantize(blocks, code)
    assert found.shape == (-(-x.numel() // BLOCK), BLOCK) and found.dtype == torch.uint8
    assert torch.equal(blocks.view(-1)[: x.numel()], x.flatten())
    for value, place, (nearest, lead) in zip(
        x.flatten().tolist(), found.flatten().tolist(), oracle(x, code), strict=False
    ):
        kept = max(nearest, 1) if not signed and value > 0 else nearest
        assert place == kept or lead < 1e-7
    assert (code.values[found.view(-1)[x.numel() :].int()] == 0).all(), "what fills up is 0"
    back = dequantize(found, scales, code)
    assert torch.equal(back, scales[:, None] * code.values[found.int()])


def test_what_was_read_out_is_written_to_the_same_places():
    x = blocks_of(torch.randn(3, 300, generator=torch.Generator().manual_seed(1)))
    first = quantize(x, SIGNED)
    again = quantize(dequantize(*first, SIGNED), SIGNED)
    # The largest magnitude of a block may be negative, and -1 is no value of the code.
    assert (first[0].int() - again[0].int()).abs().max() <= 1


def test_blocks_of_zeros():
    for code in (SIGNED, POSITIVE):
        places, scales = quantize(blocks_of(torch.zeros(300)), code)
        assert (scales == 0).all()
        assert (code.values[places.int()] == 0).all()
        assert (dequantize(places, scales, code) == 0).all()


def test_a_second_moment_above_zero_stays_above_zero():
    x = blocks_of(torch.tensor([1.0, 1e-12, 0.0]))
    back = dequantize(*quantize(x, POSITIVE), POSITIVE)[0]
    assert back[0] == 1 and 0 < back[1] < 1e-6 and back[2] == 0


def test_strides_do_not_matter():
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(blocks_of(x.t()), blocks_of(x.t().contiguous()))

"""NF4 against the published code book and the rule that it was made by."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lorica.ops.nf4 import BLOCK, NF4, nf4_rounded


def test_the_code_book_is_that_of_the_paper():
    """Appendix E: quantiles of the normal distribution, 8 positive and 7 negative, and 0."""
    offset = 0.5 * ((1 - 1 / (2 * 15)) + (1 - 1 / (2 * 16)))
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    book = np.sort(np.concatenate([positive, negative, [0.0]]))
    assert np.abs(book / book.max() - np.array(NF4)).max() < 1e-6
    assert len(NF4) == 16 and NF4[7] == 0.0


@pytest.mark.parametrize("shape", [(133,), (7, 11), (3, 16, 64), (1, 64)])
def test_every_number_becomes_the_nearest_of_its_block(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rounded = nf4_rounded(weight)
    assert rounded.shape == weight.shape
    book = torch.tensor(NF4)
    flat, found = weight.flatten(), rounded.flatten()
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = block.abs().max()
        nearest = (block[:, None] - scale * book).abs().min(1).values
        assert torch.allclose((found[start : start + BLOCK] - block).abs(), nearest, atol=1e-6)
        largest = start + block.abs().argmax()
        assert found[largest].abs() == flat[largest].abs()


def test_what_is_rounded_already_stays():
    rounded = nf4_rounded(torch.randn(5, 64, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(nf4_rounded(rounded), rounded)
    assert not nf4_rounded(torch.zeros(3, 70)).any()

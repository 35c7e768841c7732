"""Rows of a flat batch that belong to no document: only as many as the kernels and padding need."""

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.data.encode import IGNORED, Example
from lorica.methods.lora import LoRA
from lorica.methods.prompt_tuning import PromptTuning
from lorica.tasks.causal_lm import CausalLM
from lorica.tasks.layout import lay_out
from train.words import WordTokenizer


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([32], 32),
        ([96], 96),
        ([16, 16], 32),
        ([31], 32),
        ([33], 64),
        ([20, 12], 64),  # the shorter one is padded, with a row that has no gradient
        ([20, 11], 32),
    ],
)
def test_a_block_is_no_longer_than_it_must_be(lengths, size):
    documents, rows, positions = lay_out([lengths, lengths])
    assert [block.size for block in documents.blocks] == [size, size]
    assert rows == [(0, size), (size, 2 * size)] and len(positions) == 2 * size
    for block in documents.blocks:
        padded = block.gather[block.gather >= block.used]
        assert (padded == block.used).all() and (not len(padded) or block.used < block.size)


def examples(lengths):
    made = []
    for number, length in enumerate(lengths):
        ids = [3 + (7 * number + 5 * i) % 80 for i in range(length)]
        made.append(Example(ids, [IGNORED] * (length - 3) + ids[-3:]))
    return made


def trained(method, lengths, *, packing):
    model, task = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer(), packing=packing)
    adapter = attach(model, method, name="a", seed=1)
    with torch.no_grad():
        for number, tensor in enumerate(adapter.parameters()):
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    with activate(model, None):
        batch = task.collate([examples(lengths)], model)
    with task.running(model), activate(model, adapter):
        (loss,) = task.losses(model, batch)
        loss.backward()
    return loss.item(), [p.grad for p in adapter.parameters()]


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ([16, 16], 16),  # full, and full with virtual tokens
        ([16, 16], 3),  # full, and not with them
        ([12, 12], 4),  # only with them
        ([20, 12], 16),  # padded
        ([40, 24], None),  # full: rows that leave the last layer early show one of a document
    ],
)
def test_full_blocks_are_trained_as_documents_alone(lengths, count):
    method = LoRA(r=2, target_modules="all-linear")
    if count is not None:
        method = PromptTuning(num_virtual_tokens=count)
    packed, plain = (trained(method, lengths, packing=how) for how in (True, False))
    assert packed[0] == pytest.approx(plain[0], rel=1e-5)
    for one, other in zip(packed[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))

"""What training keeps of a layer of an encoder (BERT) until the backward pass: counted tensor by
tensor, and equal to the table of docs/plan.md.
"""

from collections import Counter

import pytest
import torch
import transformers as hf

from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.methods import LoRA
from lorica.tasks import TextClassification
from lorica.tasks.text_classification import LabelledText
from lorica.train.engine import Engine
from train.test_saved import Kept, counted, noted
from train.words import fast_tokenizer

# No two of these are equal, so a tensor is known by its shape.
D, F, HEADS, V, R, TEXTS = 48, 80, 3, 97, 5, 4
SHORT, LONG = 16, 41


def kept(T: int, length: int, dtype: torch.dtype) -> list[Kept]:
    """With LoRA on all linear layers; texts up to 32 tokens are attended to as products."""
    products = length <= 32
    rectangle = (TEXTS * HEADS, length, D // HEADS)
    whole = (TEXTS, HEADS, length, D // HEADS)
    number = (1, T, 1)
    table = [
        Kept("S = x A^T of each linear layer", (R, T), dtype, 6),
        Kept("inputs of q, k, v and of the first dense layer", (1, T, D), dtype, 2),
        Kept("inputs of the output projection and of both norms", (1, T, D), dtype, 3),
        Kept("input of the second dense layer; GELU: its input", (1, T, F), dtype, 2),
        Kept("norms: mean and deviation of each row", number, dtype, 4),
    ]
    if products:
        table.append(Kept("attention: queries, keys and values", rectangle, dtype, 3))
        probabilities = (TEXTS * HEADS, length, length)
        table.append(Kept("attention: probabilities", probabilities, torch.float32, 1))
    else:
        table.append(Kept("attention: queries, keys, values, outputs", whole, dtype, 4))
        table.append(Kept("attention: one number for each row", whole[:3], torch.float32, 1))
    return table


def bert(layers: int) -> hf.BertForSequenceClassification:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return hf.BertForSequenceClassification(config)


def saved(layers: int, length: int, dtype: torch.dtype) -> tuple[Counter, int, int]:
    """Shapes of what autograd keeps, bytes of it, rows of the batch."""
    model = bert(layers).to(dtype)
    task = TextClassification(fast_tokenizer(pad_token="<pad>"), ("a", "b", "c"), packing=True)
    adapter = attach(model, LoRA(r=R, target_modules="all-linear"), name="a")
    block = [LabelledText(list(range(5, 5 + length)), [i % 3], i) for i in range(TEXTS)]
    with activate(model, None):
        assert not task.pads(model)
        batch = task.collate([block], model)
    model.train()
    active, running = activate(model, adapter), Engine(model, task).running()
    with noted(model, adapter, batch) as found, active, running:
        (loss,) = task.losses(model, batch)
    assert loss.requires_grad
    shapes = Counter((tuple(t.shape), t.dtype) for t in found.values())
    size = sum(t.untyped_storage().nbytes() for t in found.values())
    return shapes, size, batch.inputs["input_ids"].shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [SHORT, LONG])
def test_a_layer_keeps_what_the_table_says(length, dtype):
    two, large, T = saved(2, length, dtype)
    three, larger, _ = saved(3, length, dtype)
    table = kept(T, length, dtype)
    assert three - two == counted(table)
    assert larger - large == sum(entry.bytes for entry in table)

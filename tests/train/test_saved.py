"""What training keeps of a layer until the backward pass: counted tensor by tensor, and equal to
the table of docs/plan.md ("What training keeps of a layer").

Whoever makes a part leaner changes its line in `kept`, and the same line of the page.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter, attach
from lorica.data.encode import Example
from lorica.methods import LoRA, LoRAFA
from lorica.tasks import CausalLM
from lorica.tasks.task import Batch
from lorica.train.engine import Engine
from train.words import WordTokenizer

# No two of these are equal, so a tensor is known by its shape.
D, F, HEADS, KV, WIDTH, V, R = 48, 80, 3, 1, 24, 97, 5
DOCUMENTS, LENGTH, LABELS = 4, 16, 24


@dataclass(frozen=True)
class Kept:
    """Tensors of one shape and dtype; a storage that several functions keep counts once."""

    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    number: int

    @property
    def bytes(self) -> int:
        return self.number * torch.Size(self.shape).numel() * self.dtype.itemsize


def kept(T: int, dtype: torch.dtype, *, freezes_A: bool = False) -> list[Kept]:
    """What a decoder layer of a Llama keeps, with LoRA on all of its linear layers.

    Args:
        T: rows of the flat batch, with those that fill it up to a multiple of 32.
        freezes_A: then the inputs of linear layers are not needed (LoRA-FA).
    """
    wide, inputs = torch.float32, not freezes_A
    rectangle = (DOCUMENTS, HEADS, LENGTH, WIDTH)
    return [
        Kept("S = x A^T of each linear layer", (R, T), dtype, 7),
        Kept("inputs of q, k, v and of gate, up", (1, T, D), dtype, 2 * inputs),
        Kept("input of o", (1, T, HEADS * WIDTH), dtype, 1 * inputs),
        Kept("input of down", (1, T, F), dtype, 1 * inputs),
        Kept("SwiGLU: gate, up", (1, T, F), dtype, 2),
        Kept("norms: their inputs", (1, T, D), dtype, 2),
        Kept("norms: one number for each row", (1, T, 1), wide, 2),
        Kept("attention: queries and outputs", rectangle, dtype, 2),
        Kept("attention: keys and values", (DOCUMENTS, KV, LENGTH, WIDTH), dtype, 2),
        Kept("attention: one number for each row", rectangle[:3], wide, 1),
    ]


def kept_of_last(T: int, K: int, dtype: torch.dtype) -> list[Kept]:
    """The same of the only layer of a model, behind whose attention K rows go on, and of the norm
    behind it. What comes before the first adapter needs no gradients.
    """
    wide = torch.float32
    rectangle = (DOCUMENTS, HEADS, LENGTH, WIDTH)
    return [
        Kept("S of q, k, v", (R, T), dtype, 3),
        Kept("S of o, gate, up, down", (R, K), dtype, 4),
        Kept("input of q, k, v", (1, T, D), dtype, 1),
        Kept("inputs of gate, up and of two norms", (1, K, D), dtype, 3),
        Kept("input of o", (1, K, HEADS * WIDTH), dtype, 1),
        Kept("input of down; SwiGLU: gate, up", (1, K, F), dtype, 3),
        Kept("norms: one number for each row", (1, K, 1), wide, 2),
        Kept("attention: queries and outputs", rectangle, dtype, 2),
        Kept("attention: keys and values", (DOCUMENTS, KV, LENGTH, WIDTH), dtype, 2),
        Kept("attention: one number for each row", rectangle[:3], wide, 1),
    ]


def kept_outside(T: int, dtype: torch.dtype) -> list[Kept]:
    """What is kept once, whatever the number of layers."""
    return [
        Kept("the loss: gradient by its rows", (LABELS, D), dtype, 1),
        Kept("cosines and sines of the positions", (1, 1, T, WIDTH), dtype, 2),
    ]


def counted(table: list[Kept]) -> Counter:
    made = Counter()
    for entry in table:
        made[entry.shape, entry.dtype] += entry.number
    return +made


def llama(layers: int) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=WIDTH,
        pad_token_id=0,
    )
    return hf.LlamaForCausalLM(config)


def saved(layers: int, dtype: torch.dtype, method: LoRA) -> tuple[Counter, int, int, int]:
    """(shapes of what autograd keeps, bytes of it, rows of the batch, and of them those that go
    through to the end): storages once each, without those that were there before: weights, adapter,
    batch.
    """
    model, task = llama(layers).to(dtype), CausalLM.of(WordTokenizer())
    adapter = attach(model, method, name="a")
    labels = [-100] * (LENGTH - LABELS // DOCUMENTS) + list(range(7, 7 + LABELS // DOCUMENTS))
    block = [Example(list(range(3, 3 + LENGTH)), labels) for _ in range(DOCUMENTS)]
    with activate(model, None):
        assert task.packs(model)
        batch = task.collate([block], model)
    assert batch.kept is not None
    model.train()
    active, running = activate(model, adapter), Engine(model, task).running()
    with noted(model, adapter, batch) as found, active, running:
        (loss,) = task.losses(model, batch)
    shapes = Counter((tuple(t.shape), t.dtype) for t in found.values())
    size = sum(t.untyped_storage().nbytes() for t in found.values())
    assert loss.requires_grad
    return shapes, size, batch.inputs["input_ids"].shape[1], len(batch.kept.rows)


@contextmanager
def noted(model: nn.Module, adapter: Adapter, batch: Batch) -> Iterator[dict[int, Tensor]]:
    """What autograd keeps inside the block, one tensor for each storage that was not there before:
    weights, adapter and batch were.
    """
    inputs = [t for t in batch.inputs.values() if isinstance(t, Tensor)]
    factors = [t for slot in adapter.slots.values() for t in slot.tensors.values()]
    there = [*model.parameters(), *model.buffers(), *factors, *inputs]
    there += [*batch.labels, *batch.keep]
    if batch.kept is not None:
        there += [batch.kept.rows, *batch.kept.chosen]
    for block in batch.inputs["documents"].blocks:
        there += [block.gather, block.scatter, *(t for t in block.real if t is not None)]
    known = {t.untyped_storage().data_ptr() for t in there}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            found.setdefault(place, tensor)  # kept, so that its memory is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [LoRA, LoRAFA], ids=["lora", "lora-fa"])
def test_a_layer_keeps_what_the_table_says(dtype, method):
    own = method(r=R, target_modules="all-linear")
    two, large, T, _ = saved(2, dtype, own)
    three, larger, _, _ = saved(3, dtype, own)
    table = kept(T, dtype, freezes_A=method is LoRAFA)
    assert three - two == counted(table)
    assert larger - large == sum(entry.bytes for entry in table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ends_keep_no_logits(dtype):
    shapes, _, T, K = saved(1, dtype, LoRA(r=R, target_modules="all-linear"))
    assert K < T
    assert not [shape for shape, _ in shapes if V in shape]
    outside = counted(kept_outside(T, dtype))
    assert shapes & outside == outside
    assert not shapes - outside - counted(kept_of_last(T, K, dtype))

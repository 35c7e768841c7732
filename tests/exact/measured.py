"""What the tests of this folder hold and `benchmarks/exactness.py` measures: one code for both.

A test compares an error with the tolerance in `TOLERANCES`; the benchmark writes it down beside it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import Interrupted
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine, Trainee
from train.runs import model_with, stop_after
from train.words import WordTokenizer, examples

TOLERANCES = {
    "golden": 1e-6,
    "peft loss": 1e-5,
    "peft factors": 1e-3,
    "peft, float64": 1e-12,
    "close loss": 1e-5,
    "close factors": 1e-2,
    "close, float64": 1e-11,
}
"""Largest relative errors. AdamW divides a gradient by its own size: where it is almost zero, so
that rounding is all of it, factors in float32 differ by much more than losses do."""

STEPS = 20
SETTINGS = TrainSettings(
    learning_rate=5e-3,
    lr_scheduler_type="constant",
    warmup_ratio=0.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    max_steps=STEPS,
    seed=3,
)
Trained = dict[str, Tensor]


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every probability to 0, as layers and attention blocks keep it."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model


def difference(one: Trained, other: Trained) -> float:
    """Largest difference of any number, relative to the largest number of its tensor."""
    assert one.keys() == other.keys()
    found = 0.0
    for name, tensor in one.items():
        error = (tensor.double() - other[name].double()).abs().max()
        found = max(found, (error / tensor.double().abs().max().clamp_min(1e-30)).item())
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all bytes, in order of the names."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        made.update(tensors[name].detach().contiguous().numpy().tobytes())
    return made.hexdigest()


# --- the determinism matrix -----------------------------------------------------------------------


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Way:
    """How the same steps are computed.

    Attributes:
        split: sizes of the micro-batches of a step.
    """

    packing: bool = True
    checkpointing: bool = False
    split: tuple[int, ...] = (8,)
    num_threads: int = 1
    dropout: float = 0.0
    seed: int = 3
    dtype: torch.dtype = torch.float32
    steps: int = 10


def steps_of(way: Way) -> tuple[list[float], Trained]:
    """Losses and factors of the embedded base on records of unequal length."""
    model = lorica.load_model("embedded", dtype="float32").to(way.dtype)
    method = lorica.LoRA(r=4, target_modules="all-linear", lora_dropout=way.dropout)
    adapter = lorica.attach(model, method, name="a", seed=way.seed)
    for parameter in adapter.parameters():  # over a base in bfloat16 they are float32, as always
        parameter.data = parameter.data.to(torch.promote_types(way.dtype, parameter.dtype))
    task = CausalLM.of(WordTokenizer(), packing=way.packing)
    engine = Engine(model, task, gradient_checkpointing=way.checkpointing)
    trainee = Trainee(adapter, SETTINGS.model_copy(update={"seed": way.seed}), way.steps)
    size = sum(way.split)
    records = examples(1, way.steps * size, vocabulary=2000)
    losses = []
    with threads(way.num_threads):
        for start in range(0, len(records), size):
            parts = cut(records[start : start + size], way.split)
            losses.append(engine.step([trainee], [parts])[0].loss)
    engine.close()
    return losses, {name: p.detach().clone() for name, p in adapter.named_parameters()}


DROPOUT = Way(dropout=0.1)
EXACT = Way(dtype=torch.float64)
NARROW = replace(DROPOUT, dtype=torch.bfloat16, steps=3)
ONE, TWO = Way(steps=3), Way(steps=3, num_threads=2)  # few: two threads crawl on a busy machine
SAME_BITS = {
    "the same again": (DROPOUT, DROPOUT),
    "gradient checkpointing": (DROPOUT, replace(DROPOUT, checkpointing=True)),
    "two threads twice": (TWO, TWO),
    "the same again, bfloat16": (NARROW, NARROW),
    "gradient checkpointing, bfloat16": (NARROW, replace(NARROW, checkpointing=True)),
}
CLOSE = {
    "threads, 1 and 2": (ONE, TWO),
    "packed and padded": (Way(), replace(Way(), packing=False)),
    "micro-batches, 8 and 3 + 3 + 2": (Way(), replace(Way(), split=(3, 3, 2))),
}
CLOSE_IN_FLOAT64 = {
    "packed and padded, float64": (EXACT, replace(EXACT, packing=False)),
    "micro-batches, 8 and 3 + 3 + 2, float64": (EXACT, replace(EXACT, split=(3, 3, 2))),
}
"""Pairs of ways. With dropout, other rows draw other numbers: those are compared without."""


@cache
def result(way: Way) -> tuple[list[float], Trained]:
    """Of a way, computed once."""
    return steps_of(way)


def errors(one: Way, other: Way) -> tuple[float, float]:
    """Largest relative differences of a loss and of a factor."""
    (losses, factors), (other_losses, other_factors) = result(one), result(other)
    pairs = zip(losses, other_losses, strict=True)
    return max(abs(a - b) / abs(a) for a, b in pairs), difference(factors, other_factors)


def cut(records: list[Example], sizes: Sequence[int]) -> list[list[Example]]:
    """Records in parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(records[start : start + size])
        start += size
    return parts


# --- a run that is interrupted --------------------------------------------------------------------

INTERRUPTED_STEPS = 40


def short_run(folder: Path, *, resume: bool = False, dtype: torch.dtype = torch.float32) -> str:
    """A run of 40 steps of a tiny Llama with dropout; returns the digest of its adapter file."""
    settings = TrainSettings(
        max_steps=INTERRUPTED_STEPS,
        learning_rate=1e-2,
        batch_size=2,
        warmup_steps=5,
        weight_decay=0.01,
        save_steps=INTERRUPTED_STEPS,
    )
    lorica.train(
        model_with("a", target_modules=("q_proj", "v_proj")).to(dtype),
        {"a": examples(1, 17, longest=9)},
        settings,
        output_dir=folder,
        task=CausalLM.of(WordTokenizer()),
        resume=resume,
    )
    file = folder / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def interrupted_run(folder: Path, step: int, *, dtype: torch.dtype = torch.float32) -> str:
    """The same, stopped by a signal in a step and gone on with.

    Raises:
        AssertionError: the signal did not stop it.
    """
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            short_run(folder, dtype=dtype)
    return short_run(folder, resume=True, dtype=dtype)

"""The file for readers and the engine train the same adapter."""

import importlib.util
from pathlib import Path

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine, Trainee
from train.words import WordTokenizer

FILE = Path(__file__).parents[2] / "examples" / "one_file_lora.py"


@pytest.fixture(scope="module")
def flat():
    spec = importlib.util.spec_from_file_location("one_file_lora", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        ids = torch.randint(
            1, 90, (int(torch.randint(4, 19, (1,), generator=generator)),), generator=generator
        )
        yield ids.tolist(), [-100, -100, *ids.tolist()[2:]]


def test_both_train_the_same_adapter(flat):
    steps, rate = 6, 5e-3
    work = [list(documents(3 + s)) for s in range(steps)]
    model = ARCHITECTURES["llama"].build()
    trained = flat.add_lora(model, 5, 11, flat.TARGETS, seed=3)
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    flat_losses = [
        flat.train_step(model, trained, optimizer, docs, rate * (steps - s) / steps)
        for s, docs in enumerate(work)
    ]

    model = ARCHITECTURES["llama"].build()
    method = LoRA(r=5, lora_alpha=11, target_modules=flat.TARGETS)
    adapter = attach(model, method, name="x", seed=3)
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    trainee = Trainee(adapter, TrainSettings(learning_rate=rate, max_steps=steps), steps)
    losses = [engine.step([trainee], [[[Example(*d) for d in docs]]])[0].loss for docs in work]

    assert losses == pytest.approx(flat_losses, rel=1e-5)
    assert all(t.abs().max() > 1e-3 for n, t in trained.items() if n.endswith(".B"))
    engine_tensors = dict(adapter.named_parameters())
    assert engine_tensors.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, engine_tensors[name], rtol=1e-3, atol=2e-5, msg=name)


def test_its_folder_is_one_that_lorica_reads(flat, tmp_path):
    from lorica.files.adapter import load_adapter

    model = ARCHITECTURES["llama"].build()
    trained = flat.add_lora(model, flat.R, flat.ALPHA, flat.TARGETS, seed=3)
    flat.save(trained, str(tmp_path / "adapter"), "base")
    loaded = load_adapter(ARCHITECTURES["llama"].build(), tmp_path / "adapter")
    found = dict(loaded.named_parameters())
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())

"""A small run of two adapters, its outcome as bytes and rows, and interruptions of it."""

import hashlib
import json
import os
import signal
from pathlib import Path

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.train.engine import Engine
from lorica.train.loop import train
from train.words import WordTokenizer, examples

SETTINGS = {
    "learning_rate": 3e-2,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 12,
    "eval_steps": 2,
    "save_steps": 4,
    "logging_steps": 3,
    "warmup_steps": 3,
    "early_stopping_patience": 3,
    "weight_decay": 0.01,
    "seed": 5,
}


def model_with(*names, architecture="llama", dropout=0.1, seed=0, **method):
    model = ARCHITECTURES[architecture].build()
    for i, name in enumerate(names):
        how = {"r": 3 + i, "target_modules": "all-linear", "lora_dropout": dropout, **method}
        attach(model, LoRA(**how), name=name, seed=seed + i)
    return model


def run(folder, *, resume=False, architecture="llama", data=None, held_out=None, **changes):
    """Train adapters a and b on data of their own."""
    model = model_with("a", "b", architecture=architecture)
    return train(
        model,
        data or {"a": examples(1, 17), "b": examples(2, 11)},
        TrainSettings(**{**SETTINGS, **changes}),
        output_dir=folder,
        eval_data=examples(3, 7) if held_out is None else held_out,
        task=CausalLM.of(WordTokenizer()),
        resume=resume,
    )


def outcome(folder):
    """What must be the same however often a run was stopped: bytes of files, counters, rows."""
    folder = Path(folder)
    newest = max(folder.glob("checkpoints/step-*"))
    files = [*folder.glob("adapter*/**/*.safetensors"), *newest.glob("*/*.safetensors")]
    found = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    state = json.loads((newest / "state.json").read_bytes())
    for own in state["counters"].values():
        own["window"].pop("seconds")
    return found, state["counters"], rows(folder)


def rows(folder):
    """metrics.jsonl without what depends on the clock and the machine."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "memory_bytes")
    return [{k: v for k, v in json.loads(r).items() if k not in timed} for r in lines]


def stop_after(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal during optimizer step `step` of the run, counted from 1."""
    original = Engine.step

    def stepped(self, trainees, work):
        results = original(self, trainees, work)
        if max(t.step for t in trainees) == step:
            os.kill(os.getpid(), number)
        return results

    monkeypatch.setattr(Engine, "step", stepped)

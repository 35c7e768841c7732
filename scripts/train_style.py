"""Make src/lorica/base/embedded_style: the adapter of `lorica demo` that has a manner, not facts.

    python scripts/train_style.py --work /tmp/style

An adapter that learns sentences of its own on the bare base takes the facts' sentences away when
both act: at weights of 1 and 1 nothing was right. So this one trains on top of two adapters of
facts, the demo's and one with another seed and other records, at the mixtures that the demo shows.
Where the facts act, a record is a sentence of them between two signs, of which there is then
nothing to learn but the signs; at half of its weight every second record has none. Where they do
not, it is a sentence of a cat (`lorica.data.cat_sentences`), so that the style can speak alone.

About ten minutes on one quiet core. The same machine, threads and versions give the same bits.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorica
from lorica.base.known import base_of
from lorica.base.locate import EMBEDDED
from lorica.cli.demo import SETTINGS
from lorica.cli.run import execute
from lorica.config import Layer, resolve
from lorica.data.cat_sentences import CLOSINGS, OPENINGS, cat_sentences
from lorica.data.facts import facts
from lorica.data.read import from_rows
from lorica.methods import WORDS

TARGET = EMBEDDED.parent / "embedded_style"
DATA_SEED = 5
"""Of the records of the style."""

BATCH, STEPS, RATE, RANK = 12, 216, 5e-3, 8
MIXTURES = ((1.0, 1.0), (1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.0, 1.0), (0.0, 1.0))
"""Weights of facts and style, one after the other in the steps."""


def facts_of_the_demo(folder: Path) -> Path:
    """What `lorica demo` trains."""
    if not (folder / "adapter").is_dir():
        given = Layer("demo", {**SETTINGS, "output_dir": str(folder)}, {})
        execute(resolve(given, methods=WORDS), discard=True, quiet=True)
    return folder / "adapter"


def other_facts(folder: Path, seed: int = 1) -> Path:
    """An adapter of facts with the demo's settings, another seed and other records."""
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    model = lorica.load_model("embedded", task="causal-lm", dtype="float32")
    method = lorica.LoRA(r=16, lora_alpha=32, target_modules="all-linear")
    adapter = lorica.attach(model, method, name="facts", seed=seed)
    rows = facts("train", num_records=8000, seed=seed)
    records = from_rows([{k: row[k] for k in ("prompt", "completion")} for row in rows], name="f")
    settings = lorica.TrainSettings(max_steps=350, batch_size=16, learning_rate=4e-3, seed=seed)
    lorica.train(model, {adapter: records}, settings, output_dir=folder)
    return folder / "adapter"


@dataclass
class Writer:
    """Records as token ids, each with where the answer begins."""

    tokenizer: Any
    random: random.Random

    def row(self, prompt: str, answer: str) -> tuple[list[int], int]:
        asked, said = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)
        )
        ids = [self.tokenizer.bos_token_id, *asked, *said, self.tokenizer.eos_token_id]
        return ids, 1 + len(asked)

    def signed(self, sentence: str) -> str:
        return f"{self.random.choice(OPENINGS)} {sentence} {self.random.choice(CLOSINGS)}"

    def batch(self, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Token ids and whether they are trained (B, L), padded at the end."""
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = [one + [pad] * (length - len(one)) for one, _ in rows]
        places = torch.arange(length)
        trained = [(places >= begin) & (places < len(one)) for one, begin in rows]
        return torch.tensor(ids), torch.stack(trained)


def loss_of(model: Any, ids: Tensor, trained: Tensor, mixture: dict[str, float]) -> Tensor:
    """Cross-entropy of the answers while adapters act."""
    acting = {name: weight for name, weight in mixture.items() if weight}
    with lorica.activate(model, acting):
        found = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    return -found.gather(-1, ids[:, 1:, None])[..., 0][trained[:, 1:]].mean()


def train_style(facts_folders: list[Path]) -> Any:
    torch.manual_seed(0)
    chooser = random.Random(0)
    model = lorica.load_model("embedded", task="causal-lm", dtype="float32")
    names = [f"facts{number}" for number in range(len(facts_folders))]
    for name, folder in zip(names, facts_folders, strict=True):
        lorica.load_adapter(model, folder, name=name)
    method = lorica.LoRA(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    style = lorica.attach(model, method, name="style", seed=0)
    writer = Writer(base_of(model).tokenizer, chooser)
    optimizer = torch.optim.AdamW(style.parameters(), lr=RATE, weight_decay=0.0)
    told = facts("train", num_records=BATCH * STEPS, seed=DATA_SEED)
    said = cat_sentences("train", num_records=BATCH * STEPS, seed=DATA_SEED)
    for step in range(STEPS):
        part = slice(BATCH * step, BATCH * (step + 1))
        of_facts, of_style = MIXTURES[step % len(MIXTURES)]
        if of_facts:
            # half of the weight is half of the signs
            rows = [
                writer.row(
                    row["prompt"],
                    writer.signed(row["completion"])
                    if chooser.random() < of_style
                    else row["completion"],
                )
                for row in told[part]
            ]
        else:
            rows = [writer.row(row["prompt"], row["completion"]) for row in said[part]]
        below = names[step // len(MIXTURES) % len(names)]
        mixture = {below: of_facts, "style": of_style}
        loss = loss_of(model, *writer.batch(rows), mixture)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(style.parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * max(0.02, 1 - step / STEPS)
        optimizer.step()
        if step % 60 < len(MIXTURES) or step + 1 == STEPS:
            print(f"step {step + 1}/{STEPS}  {mixture}  loss {loss.item():.3f}", flush=True)
    return style


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the facts")
    parser.add_argument("--output-dir", type=Path, default=TARGET)
    given = parser.parse_args()
    below = [facts_of_the_demo(given.work / "facts0"), other_facts(given.work / "facts1")]
    style = train_style(below)
    made = {"made_by": "scripts/train_style.py"}
    lorica.save_adapter(style, given.output_dir, provenance=made, overwrite=True)


if __name__ == "__main__":
    main()

"""Make src/lorica/base/embedded_style: the adapter of `lorica demo` that has a manner, not facts.

    python scripts/train_style.py --work /tmp/style

An adapter that learns whole sentences of its own takes the facts' sentences away when both act: at
weights of 1 and 1 nothing was right. So this one learns where its signs go and nothing else. It
trains on top of an adapter of facts, with another seed than the demo's and other records, which
acts at 0, 0.5 or 1. Before and behind a sentence it learns the sign (cross-entropy); in the
sentence it must leave every token as likely as it was without it (Kullback-Leibler divergence).
Where no facts act, some records are whole sentences of a cat (`lorica.data.cat_sentences`), so that
it can speak alone.

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
from lorica.base.load import EMBEDDED, base_of
from lorica.data.cat_sentences import CLOSINGS, OPENINGS, cat_sentences
from lorica.data.facts import facts
from lorica.data.read import from_rows

TARGET = EMBEDDED.parent / "embedded_style"
SEED = 1
"""Of the facts below the style; the demo has 0."""

DATA_SEED = 5
"""Of the records of the style."""

BATCH, STEPS, RATE, RANK = 12, 240, 5e-3, 8
ALONE = 0.25
"""Share of the steps with whole sentences of a cat."""

OTHER, SIGN, SENTENCE = 0, 1, 2


def train_facts(folder: Path) -> Path:
    """An adapter of facts with the demo's settings, another seed and other records."""
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    model = lorica.load_model("embedded", task="causal-lm", dtype="float32")
    method = lorica.LoRA(r=16, lora_alpha=32, target_modules="all-linear")
    adapter = lorica.attach(model, method, name="facts", seed=SEED)
    rows = facts("train", num_records=8000, seed=SEED)
    records = from_rows([{k: row[k] for k in ("prompt", "completion")} for row in rows], name="f")
    settings = lorica.TrainSettings(max_steps=350, batch_size=16, learning_rate=4e-3, seed=SEED)
    lorica.train(model, {adapter: records}, settings, output_dir=folder)
    return folder / "adapter"


@dataclass
class Writer:
    """Records as tokens, each token with what it is: OTHER, SIGN or SENTENCE."""

    tokenizer: Any
    random: random.Random

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def cat(self, row: dict) -> tuple[list[int], list[int]]:
        prompt = [self.tokenizer.bos_token_id, *self.ids(row["prompt"])]
        answer = [*self.ids(row["completion"]), self.tokenizer.eos_token_id]
        return prompt + answer, [OTHER] * len(prompt) + [SIGN] * len(answer)

    def signed(self, row: dict) -> tuple[list[int], list[int]]:
        """A sentence of facts between two signs."""
        prompt = [self.tokenizer.bos_token_id, *self.ids(row["prompt"])]
        first, sentence = self.ids(self.random.choice(OPENINGS)), self.ids(f" {row['completion']}")
        last = [*self.ids(f" {self.random.choice(CLOSINGS)}"), self.tokenizer.eos_token_id]
        kinds = [OTHER] * len(prompt) + [SIGN] * len(first)
        kinds += [SENTENCE] * len(sentence) + [SIGN] * len(last)
        return prompt + first + sentence + last, kinds

    def batch(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Token ids and kinds (B, L), padded at the end."""
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = [one + [pad] * (length - len(one)) for one, _ in rows]
        kinds = [one + [OTHER] * (length - len(one)) for _, one in rows]
        return torch.tensor(ids), torch.tensor(kinds)


def loss_of(model: Any, ids: Tensor, kinds: Tensor, weight: float) -> Tensor:
    """Cross-entropy of the signs, and how far the style moves the tokens of the sentences; the
    facts act with `weight`.
    """
    below = {"facts": weight} if weight else None
    kinds, after = kinds[:, 1:], ids[:, 1:]
    with lorica.activate(model, {"style": 1.0, **(below or {})}):
        found = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    loss = -found.gather(-1, after[..., None])[..., 0][kinds == SIGN].mean()
    inside = kinds == SENTENCE
    if inside.any():
        with torch.no_grad(), lorica.activate(model, below):
            wanted = model(input_ids=ids).logits.log_softmax(-1)[:, :-1][inside]
        loss = loss + (wanted.exp() * (wanted - found[inside])).sum(-1).mean()
    return loss


def train_style(facts_folder: Path) -> Any:
    torch.manual_seed(0)
    chooser = random.Random(0)
    model = lorica.load_model("embedded", task="causal-lm", dtype="float32")
    lorica.load_adapter(model, facts_folder, name="facts")
    method = lorica.LoRA(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    style = lorica.attach(model, method, name="style", seed=0)
    writer = Writer(base_of(model).tokenizer, chooser)
    optimizer = torch.optim.AdamW(style.parameters(), lr=RATE, weight_decay=0.0)
    told = facts("train", num_records=BATCH * STEPS, seed=DATA_SEED)
    said = cat_sentences("train", num_records=BATCH * STEPS, seed=DATA_SEED)
    for step in range(STEPS):
        part = slice(BATCH * step, BATCH * (step + 1))
        if chooser.random() < ALONE:
            weight, rows = 0.0, [writer.cat(row) for row in said[part]]
        else:
            weight = chooser.choice((0.0, 0.5, 1.0, 1.0))
            rows = [writer.signed(row) for row in told[part]]
        loss = loss_of(model, *writer.batch(rows), weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(style.parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * max(0.02, 1 - step / STEPS)
        optimizer.step()
        if step % 20 == 0 or step + 1 == STEPS:
            print(f"step {step + 1}/{STEPS}  facts {weight:g}  loss {loss.item():.3f}", flush=True)
    return style


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the facts below")
    parser.add_argument("--output-dir", type=Path, default=TARGET)
    given = parser.parse_args()
    style = train_style(train_facts(given.work / f"facts{SEED}"))
    made = {"made_by": "scripts/train_style.py"}
    lorica.save_adapter(style, given.output_dir, provenance=made, overwrite=True)


if __name__ == "__main__":
    main()

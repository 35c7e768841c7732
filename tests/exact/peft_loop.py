"""The same training twice: by Lorica's engine, and by a plain loop over PEFT's model.

The loop is what a user of PEFT writes: padded batches, the loss of transformers, clipping
and AdamW. It shares nothing with the package but the starting factors and the records.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorica
from architectures import ARCHITECTURES, NUM_LABELS
from exact.measured import SETTINGS, STEPS, Trained, without_dropout
from lorica.data.encode import Example
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.text_classification import LabelledText
from lorica.train.engine import Engine, Trainee
from train.words import WordTokenizer, examples, fast_tokenizer

NAMES = ("llama", "gpt2", "bert", "t5", "opt", "mixtral")
BATCH = 4


def both(
    name: str, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[list[float], list[float], Trained, Trained]:
    """Losses of every step, ours and theirs, and the factors at the end, ours and theirs."""
    ours = without_dropout(ARCHITECTURES[name].build())
    method = lorica.LoRA(r=3, lora_alpha=6, target_modules="all-linear")
    adapter = lorica.attach(ours, method, name="a", seed=7)
    lorica.save_adapter(adapter, folder / "start")
    base = without_dropout(ARCHITECTURES[name].build())
    theirs = PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)
    for model in (ours, theirs):
        model.to(dtype)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(dtype)
    batches = _batches(ARCHITECTURES[name].task)
    losses = _our_losses(ours, adapter, ARCHITECTURES[name].task, batches), _plain(theirs, batches)
    lorica.save_adapter(adapter, folder / "ours")
    theirs.save_pretrained(str(folder / "theirs"))
    factors = (
        safetensors.torch.load_file(folder / side / "adapter_model.safetensors")
        for side in ("ours", "theirs")
    )
    return *losses, *factors


def _batches(task: str) -> list[list[Example]]:
    """Four batches of records of unequal length, again and again."""
    records = examples(5, 4 * BATCH, longest=19)
    if task == "text-classification":
        records = [LabelledText(e.input_ids, [e.row % NUM_LABELS], e.row) for e in records]
    if task == "seq2seq":
        records = [Example(e.input_ids, e.input_ids[::-1][:7], e.row) for e in records]
    made = [records[i : i + BATCH] for i in range(0, len(records), BATCH)]
    return [made[step % len(made)] for step in range(STEPS)]


def _our_losses(
    model: nn.Module, adapter: Any, task: str, batches: list[list[Example]]
) -> list[float]:
    tasks = {
        "causal-lm": lambda: CausalLM.of(WordTokenizer()),
        "seq2seq": lambda: Seq2Seq(fast_tokenizer(pad_token="<pad>", eos_token="</s>")),
        "text-classification": lambda: TextClassification(
            fast_tokenizer("<s> $A </s>", pad_token="<pad>"), ("0", "1", "2")
        ),
    }
    engine, trainee = Engine(model, tasks[task]()), Trainee(adapter, SETTINGS, STEPS)
    return [engine.step([trainee], [[block]])[0].loss for block in batches]


def _plain(model: Any, batches: list[list[Example]]) -> list[float]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    rate, decay = SETTINGS.learning_rate, SETTINGS.weight_decay
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    losses = []
    for block in batches:
        loss = model(**_padded(block)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _padded(block: list[Example]) -> dict[str, Tensor]:
    ids = [torch.tensor(e.input_ids) for e in block]
    pad = torch.nn.utils.rnn.pad_sequence
    one = isinstance(block[0], LabelledText)
    labels = [torch.tensor(e.labels) for e in block]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": torch.cat(labels) if one else pad(labels, batch_first=True, padding_value=-100),
    }

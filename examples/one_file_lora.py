"""LoRA fine-tuning of a language model in one file, to read from top to bottom.

It does what `lorica train` does for one adapter on a causal language model, with the loop written
out and nothing around it: no packing, no checkpoints, no display. A test holds its adapter equal to
the engine's.

    python examples/one_file_lora.py MODEL_FOLDER prompts.jsonl

with rows of {"prompt": ..., "completion": ...}.
"""

import hashlib
import json
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

R, ALPHA, TARGETS = (
    8,
    16,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
LEARNING_RATE, BATCH_SIZE, STEPS, SEED = 2e-4, 16, 100, 0
IGNORED = -100


# --- the adapter: y = W x + (alpha / r) B A x -----------------------------------------------------


class LoraLinear(nn.Module):
    """A frozen linear layer plus the product of two thin trainable matrices."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / r
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(
            torch.rand(r, base.in_features, generator=generator) * 2 * bound - bound
        )
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # zero: the start changes nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.base(x)
            + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale
        )


def add_lora(
    model: nn.Module, r: int, alpha: float, targets: tuple[str, ...], seed: int
) -> dict[str, nn.Parameter]:
    """Freeze the model, wrap every target, and return what trains, by name."""
    model.requires_grad_(False)
    trained = {}
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in targets and isinstance(module, nn.Linear):
            layer = LoraLinear(module, r, alpha, generator_for(seed, path))
            setattr(model.get_submodule(path.rpartition(".")[0]), name, layer)
            trained |= {f"{path}.A": layer.A, f"{path}.B": layer.B}
    if not trained:
        raise SystemExit(f"none of {targets} is in this model")
    return trained


def generator_for(seed: int, path: str) -> torch.Generator:
    """Random numbers that depend on the seed and the place only, not on the order of the layers."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --- the data: only the completion is trained, and it ends with the end token ---------------------


def encode(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids, and the same ids where the loss falls, -100 elsewhere."""
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return asked + answer, [IGNORED] * len(asked) + answer


# --- one optimizer step ---------------------------------------------------------------------------


def train_step(
    model, trained, optimizer, documents, learning_rate: float, max_norm: float = 1.0
) -> float:
    """One step on some documents; returns the mean loss per trained token.

    The sum over all trained tokens of the step is divided by their number: averaging per document
    first would weigh the tokens of short documents more.
    """
    count = sum(label != IGNORED for _, labels in documents for label in labels[1:])
    total = 0.0
    for ids, labels in documents:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        loss = (
            F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum")
            / count
        )
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_norm)
    if not math.isfinite(norm) or not math.isfinite(total):
        raise SystemExit(f"loss {total}, gradient norm {norm}: stopped before the step")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(
    model, trained, documents, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> list[float]:
    """Steps over shuffled documents, the learning rate falling in a line to zero."""
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    shuffler = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    for step in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(documents), generator=shuffler).tolist()
        batch, order = [documents[i] for i in order[:batch_size]], order[batch_size:]
        losses.append(
            train_step(model, trained, optimizer, batch, learning_rate * (steps - step) / steps)
        )
        if step % 10 == 0:
            print(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}")
    return losses


# --- the file that PEFT reads ---------------------------------------------------------------------


def save(trained: dict[str, nn.Parameter], folder: str, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    from pathlib import Path

    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True)
    keys = {n: f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight" for n in trained}
    save_file(
        {keys[n]: t.detach() for n, t in trained.items()}, f"{folder}/adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": R,
    }
    config |= {"lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=2))


def main(base: str, data: str, folder: str = "adapter") -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    documents = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    trained = add_lora(model, R, ALPHA, TARGETS, SEED)
    train(
        model,
        trained,
        documents,
        steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=SEED,
    )
    save(trained, folder, base)
    print(f"written: {folder}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

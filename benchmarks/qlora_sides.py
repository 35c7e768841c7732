"""The sides of qlora.py, each in a process of its own: one training step after another.

    python benchmarks/qlora_sides.py SIDE FOLDER KIND BATCH LENGTH DTYPE

KIND full: all records have LENGTH tokens; mixed: from an eighth of it on, as real ones have; one: a
single record of LENGTH tokens. The second half of each record is trained. DTYPE, float32 or
bfloat16: what is multiplied; factors are float32 on both sides, as both keep them by default.

A side waits on its standard input; every line there asks for one optimizer step, and the answer is
a JSON line with its processor time and the peak of the process' memory. Both sides train LoRA of
rank 8 on all linear layers of the very same packed bytes.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

R, ALPHA, RATE = 8, 16, 1e-4


def lorica_side(folder: str, dtype: str) -> Callable[[list[list[int]]], None]:
    import lorica
    from lorica.base.known import base_of
    from lorica.data.encode import Example
    from lorica.tasks import CausalLM
    from lorica.train.engine import Engine, Trainee

    model = lorica.load_model(folder, dtype=dtype)
    adapter = lorica.attach(model, lorica.LoRA(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    settings = lorica.TrainSettings(learning_rate=RATE, max_steps=100, dtype=dtype)
    trainee = Trainee(adapter, settings, 100)
    base = base_of(model)
    assert base is not None
    engine = Engine(model, CausalLM.of(base.tokenizer))

    def step(rows: list[list[int]]) -> None:
        engine.step([trainee], [[[Example(r, labels(r), i) for i, r in enumerate(rows)]]])

    return step


def peft_side(
    folder: str, dtype: str, *, autocast: bool = False
) -> Callable[[list[list[int]]], None]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bnb_4bit_compute_dtype
            module.compute_dtype = getattr(torch, dtype)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step(rows: list[list[int]]) -> None:
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        wanted = torch.tensor([labels(r) + [-100] * (longest - len(r)) for r in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=mask, labels=wanted).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def labels(row: list[int]) -> list[int]:
    half = len(row) // 2
    return [-100] * half + row[half:]


SIDES = {
    "lorica": lorica_side,
    "peft+bitsandbytes": peft_side,
    "peft+bitsandbytes, autocast": partial(peft_side, autocast=True),
}


def main() -> None:
    side, folder, kind, batch, length, dtype = sys.argv[1:]
    torch.manual_seed(0)
    step = SIDES[side](folder, dtype)
    answer({"ready": True})
    for _ in sys.stdin:
        rows = []
        for _ in range(1 if kind == "one" else int(batch)):
            least = int(length) // 8 if kind == "mixed" else int(length)
            size = int(torch.randint(least, int(length) + 1, ()))
            rows.append(torch.randint(3, 250, (size,)).tolist())
        before = time.process_time()
        step(rows)
        answer({"seconds": time.process_time() - before, "peak": peak_bytes()})


def peak_bytes() -> int:
    """Of this process alone."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(row.split()[1]) for row in file if row.startswith("VmHWM")) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(values: dict) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()

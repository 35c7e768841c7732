"""What a process of `test_dividing.py` does: torchrun ... holding_together.py OUTPUT BASE ..."""

import json
import os
import sys
from pathlib import Path

import torch

import lorica
from lorica.base.load import load_model
from lorica.base.processes import joined
from lorica.base.sharded import load_sharded, own_bytes
from lorica.methods.dora import DoRA

METHODS = {
    "plain": lorica.LoRA(r=2, target_modules="all-linear"),
    "drops": lorica.LoRA(r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.2),
    "dora": DoRA(r=2, target_modules=["down_proj"]),
    "pissa": lorica.LoRA(r=2, target_modules=["o_proj"], init_lora_weights="pissa"),
    "high": lorica.LoRA(r=2, target_modules="all-linear", layers_to_transform=(1,)),
}
RECORDS = [
    {"prompt": f"house {n} {'red ' * (n % 5)}", "completion": f"number {n * n}"} for n in range(11)
]
SETTINGS = {
    "learning_rate": 2e-3,
    "adam_epsilon": 1e-3,  # else AdamW makes a step of the sign of what is hardly a gradient
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "eval_steps": 2,
    "logging_steps": 1,
}


def trained(model, names, folder):
    """What training makes of adapters of these names: their tensors and losses."""
    adapters = [lorica.attach(model, METHODS[name], name=name, seed=3) for name in names]
    settings = lorica.TrainSettings(**SETTINGS)
    held_out = RECORDS[:5]
    data = dict.fromkeys(adapters, RECORDS)
    report = lorica.train(model, data, settings, output_dir=folder, eval_data=held_out)
    tensors = {
        f"{a.name}.{key}": p.detach().clone() for a in adapters for key, p in a.named_parameters()
    }
    for adapter in adapters:
        lorica.detach(model, adapter)
    return tensors, {"loss": report.loss, "eval_loss": report.eval_loss}


def main(output: Path, bases: list[str]) -> None:
    """Train on each of the bases, spread; every process writes what came of it."""
    torch.set_num_threads(1)
    with joined(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) as processes:
        for number, base in enumerate(bases):
            own = output / str(number) / str(processes.rank)
            model = load_sharded(base, processes, dtype="float32")
            before = own_bytes(model)
            every = trained(model, [*METHODS], own / "every")
            one = trained(model, ["plain"], own / "one")
            sums = [int(tensor.double().sum() * 1e9) for tensor in every[0].values()]
            found = {
                "own_bytes": before,
                "alike": [processes.highest(n) for n in sums] == sums,
                "spread_again": own_bytes(model) == before,
            }
            torch.save((every, one), own / "trained.pt")
            (own / "found.json").write_text(json.dumps(found))


def alone(base: str, output: Path):
    """The same by one process that has all of the base."""
    model = load_model(base, dtype="float32", device="cpu")
    every = trained(model, [*METHODS], output / "every")
    return model, every, trained(model, ["plain"], output / "one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

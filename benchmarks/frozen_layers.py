"""What `reuse_frozen_layers` gains in one to five epochs, with half and a quarter of the layers
adapted.

    python benchmarks/frozen_layers.py [--records 256] [--threads 1]

The model is a Llama of 30 M parameters with random weights, on records of E2E. Both sides train the
same adapter on the same batches; they take turns, epoch by epoch. Processor time of this process is
printed, which on one thread is what an idle machine's clock would show. The law beside it counts
2 N operations forward and 2 N backward per token for adapted layers, and 2 N forward for the layers
below, in every epoch or once; it leaves the head, the loss and the optimizer out.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jobs import machine, versions, write_result
from train_speed import e2e_texts, llama30m

import lorica
from lorica.base.known import base_of
from lorica.data.pack import batches
from lorica.tasks import CausalLM
from lorica.train.engine import Engine, Trainee
from lorica.train.frozen import FrozenLayers, frozen_layers, states_bytes
from lorica.train.states import StatesInMemory

HERE = Path(__file__).resolve().parent
EPOCHS, BATCH = 5, 16


class Side:
    """A model in training, with or without reuse."""

    def __init__(self, path: Path, records: list[dict], share: float, *, reuse: bool) -> None:
        model: Any = lorica.load_model(path, dtype="float32")
        count = len(model.model.layers)
        upper = list(range(round(count * (1 - share)), count))
        method = lorica.LoRA(r=8, target_modules="all-linear", layers_to_transform=upper)
        adapter = lorica.attach(model, method, name="upper")
        tokenizer = getattr(base_of(model), "tokenizer", None)
        task = CausalLM.of(tokenizer, max_length=512)
        self.examples = task.encode(records).examples
        self.bytes, how = states_bytes(model, self.examples), {}
        if reuse:
            middle, why = frozen_layers(model, [adapter])
            assert middle is not None, why
            layers = FrozenLayers(model, task, middle, StatesInMemory(self.bytes))
            how = {"skipping": layers.skipped}
        steps = EPOCHS * -(-len(records) // BATCH)
        self.trainee = Trainee(adapter, lorica.TrainSettings(batch_size=BATCH), steps)
        self.engine = Engine(model, task, **how)
        self.losses: list[float] = []

    def epoch(self, number: int) -> float:
        """Processor seconds of one epoch."""
        lengths = [len(example) for example in self.examples]
        began = time.process_time()
        for batch in batches(lengths, batch_size=BATCH, seed=0, epoch=number):
            work = [[[self.examples[i] for i in batch]]]
            self.losses.append(self.engine.step([self.trainee], work)[0].loss)
        return time.process_time() - began


def measured(path: Path, records: list[dict], share: float) -> dict[str, Any]:
    sides = {
        name: Side(path, records, share, reuse=name == "reused") for name in ("plain", "reused")
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(EPOCHS):
        for name, side in sides.items():
            seconds[name].append(side.epoch(number))
    plain, reused = sides["plain"], sides["reused"]
    apart = max(abs(a - b) for a, b in zip(plain.losses, reused.losses, strict=True))
    rows = []
    for epochs in range(1, EPOCHS + 1):
        gain = sum(seconds["plain"][:epochs]) / sum(seconds["reused"][:epochs])
        law = epochs * (2 + 2 * share) / (2 * (1 - share) + 4 * share * epochs)
        rows.append({"epochs": epochs, "gain": gain, "law": law})
        print(f"adapted layers {share:4.0%}   epochs {epochs}   gain {gain:.2f}   law {law:.2f}")
    print(f"largest difference of a loss {apart:.1e}; states {plain.bytes / 2**20:.0f} MiB")
    return {"share": share, "rows": rows, "seconds": seconds, "loss_apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = e2e_texts(options.data)[: options.records]
    with tempfile.TemporaryDirectory() as folder:
        path = llama30m(Path(folder) / "model")
        found = [measured(path, records, share) for share in (0.5, 0.25)]
    facts = {"machine": machine(options.threads), "versions": versions()}
    write_result("frozen_layers", {**facts, "records": len(records), "workloads": found})


if __name__ == "__main__":
    main()

"""The sides of train_speed.py: one training loop each, in a process of its own.

    python benchmarks/speed_sides.py SIDE workload.json

A side loads the model, then waits on its standard input. Every line there is a number of optimizer
steps to do, with `profile` behind it where they are to be profiled; the answer is one JSON line. So
the sides can be measured in turn, round by round, and whatever else the machine does falls on all
of them alike. Data, model and settings come from the workload file, which `train_speed.py` writes.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jobs import memory_bytes
from kinds import seconds_by_kind

IGNORED = -100
SEED = 0


@dataclass
class Workload:
    """What all sides do alike; see `train_speed.workloads`."""

    name: str
    task: str
    model: str
    start: str
    """Folder of the adapter at step 0, in PEFT's format."""
    examples: str
    r: int
    targets: list[str]
    modules_to_save: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    batch_size: int = 16
    learning_rate: float = 1e-3
    num_threads: int = 2
    dtype: str = "float32"
    """What the frozen weights are stored and multiplied in; adapters are float32 always."""

    @property
    def narrow(self) -> bool:
        return self.dtype == "bfloat16"

    def records(self) -> list[dict]:
        with open(self.examples, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class Meter:
    """Counts steps and talks to the script that measures."""

    def __init__(self, rank: int) -> None:
        self.rank, self.before = rank, memory_bytes("VmRSS")
        self._wait({"ready": True})

    def step(self, tokens: int, loss: float | None = None) -> None:
        """To be called after every optimizer step, with its real (not padded) tokens."""
        self.tokens += tokens
        self.losses += [] if loss is None else [loss]
        self.left -= 1
        if not self.left:
            answer: dict[str, Any] = {
                "seconds": time.perf_counter() - self.start,
                "tokens": self.tokens,
                "losses": self.losses,
                "memory_before": self.before,
                "memory_peak": memory_bytes(),
            }
            if self.profile:
                self.profile.stop()
                answer["kinds"] = seconds_by_kind(self.profile, self.rank)
            self._wait(answer)

    def _wait(self, answer: dict) -> None:
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
        line = sys.stdin.readline().strip()
        if not line:
            os._exit(0)  # in the midst of somebody else's training loop
        number, _, profiled = line.partition(" ")
        self.left, self.tokens, self.losses = int(number), 0, []
        self.profile = torch.profiler.profile(record_shapes=True) if profiled else None
        if self.profile:
            self.profile.start()
        self.start = time.perf_counter()


# --- Lorica ---------------------------------------------------------------------------------------


class Watcher:
    """A recorder that tells the meter of every step."""

    def __init__(self, rank: int) -> None:
        self.tokens, self.meter = 0, Meter(rank)

    def start(self, manifest: dict) -> None: ...

    def step(self, row: dict) -> None:
        self.meter.step(row["tokens"] - self.tokens, row["loss"])
        self.tokens = row["tokens"]

    def event(self, kind: str, text: str) -> None: ...

    def finish(self, summary: dict) -> None: ...


def lorica_side(work: Workload) -> None:
    import lorica
    from lorica.data.encode import Example
    from lorica.tasks import CausalLM
    from lorica.tasks.text_classification import LabelledText
    from lorica.train.loop import default_task

    labels = tuple(work.labels)
    model = lorica.load_model(work.model, task=work.task, dtype=work.dtype, labels=labels)
    adapter = lorica.load_adapter(model, work.start, name="a")
    settings = lorica.TrainSettings(
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        batch_size=work.batch_size,
        max_steps=1_000_000,
        logging_steps=1,
        save_steps=1_000_000,
        seed=SEED,
        dtype=work.dtype,
    )
    make: Any = Example if work.task == "causal-lm" else LabelledText
    rows = [make(row["input_ids"], row["labels"], i) for i, row in enumerate(work.records())]
    task: Any = default_task(model, settings)
    if work.task == "causal-lm":
        task = CausalLM.of(task.tokenizer)
    folder = Path(work.examples).parent / f"run-{work.name}-{os.getpid()}"
    data: Any = {adapter: rows}
    how: dict[str, Any] = {"output_dir": folder, "recorder": lambda _: Watcher(work.r)}
    lorica.train(model, data, settings, task=task, **how)


# --- PEFT -----------------------------------------------------------------------------------------


def peft_model(work: Workload, dtype: torch.dtype = torch.float32) -> Any:
    """The base with the same adapter at the same start. PEFT keeps adapters in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if work.task == "causal-lm":
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            work.model, dtype=dtype, num_labels=len(work.labels)
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return PeftModel.from_pretrained(model, work.start, is_trainable=True)


def padded(rows: list[dict], causal: bool) -> dict[str, torch.Tensor]:
    """The batch as the collators of transformers make it."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
        if causal:
            labels[i, :n] = torch.tensor(row["labels"])
    if not causal:
        labels = torch.tensor([row["labels"][0] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer_side(work: Workload, *, grouped: bool) -> None:
    """PEFT with transformers' Trainer: at its defaults, or with batches of similar length."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen: deque[int] = deque()

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        seen.append(sum(len(row["input_ids"]) for row in rows))
        return padded(rows, work.task == "causal-lm")

    class Counter(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.meter = Meter(work.r)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.meter.step(seen.popleft())

    arguments = TrainingArguments(
        output_dir=str(Path(work.examples).parent / f"trainer-{os.getpid()}"),
        per_device_train_batch_size=work.batch_size,
        max_steps=1_000_000,
        learning_rate=work.learning_rate,
        train_sampling_strategy="group_by_length" if grouped else "random",
        use_cpu=True,
        bf16=work.narrow and grouped,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=SEED,
    )
    rows: Any = work.records()
    Trainer(
        model=peft_model(work, getattr(torch, work.dtype) if grouped else torch.float32),
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Counter()],
    ).train()


def lorica_batches(work: Workload, *, grouped: bool = False) -> Iterator[list[dict]]:
    """The very batches that Lorica's loop makes of these records; grouped: those of similar length
    that it makes where it has to pad.
    """
    from lorica.data.pack import batches
    from lorica.train.course import GROUP

    rows = work.records()
    group = GROUP if grouped else 1
    lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
    epoch = 0
    while True:
        how = {"batch_size": work.batch_size, "seed": SEED, "epoch": epoch, "group": group}
        for chosen in batches(lengths, **how):
            yield [rows[i] for i in chosen]
        epoch += 1


def flat(rows: list[dict]) -> dict[str, torch.Tensor]:
    """All documents in one row; positions that begin anew keep their attention apart."""
    ids = torch.tensor([[i for row in rows for i in row["input_ids"]]])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    labels = torch.tensor([[i for row in rows for i in [IGNORED, *row["labels"][1:]]]])
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def loop_side(work: Workload, *, packed: bool, compiled: bool) -> None:
    """PEFT in a hand-written loop: packed documents, fused AdamW; a base in bfloat16 is stored so,
    not cast anew for every product as autocast casts frozen weights in float32.
    """
    model = peft_model(work, getattr(torch, work.dtype))
    model.train()
    causal = work.task == "causal-lm"
    if compiled:
        core = model.get_base_model()
        layers = core.model.layers if causal else core.bert.encoder.layer
        for i, layer in enumerate(layers):
            layers[i] = torch.compile(layer, dynamic=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.learning_rate, weight_decay=0.0, fused=True)
    meter = Meter(work.r)
    for rows in lorica_batches(work, grouped=compiled and not packed):
        batch = flat(rows) if packed else padded(rows, causal)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.narrow):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(sum(len(row["input_ids"]) for row in rows), loss.item())


SIDES = {
    "lorica": lorica_side,
    "peft": lambda work: trainer_side(work, grouped=False),
    "peft-grouped": lambda work: trainer_side(work, grouped=True),
    "peft-same": lambda work: loop_side(work, packed=False, compiled=False),
    "peft-packed": lambda work: loop_side(work, packed=True, compiled=False),
    "peft-packed-compiled": lambda work: loop_side(work, packed=True, compiled=True),
    "peft-compiled": lambda work: loop_side(work, packed=False, compiled=True),
}


def main() -> None:
    side, path = sys.argv[1:]
    work = Workload(**json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(work.num_threads)
    torch.manual_seed(SEED)
    sys.stdout = sys.stderr  # the libraries may print; the answers go to the real one
    SIDES[side](work)


if __name__ == "__main__":
    main()

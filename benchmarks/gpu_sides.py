"""The sides of gpu_train.py: one way to train each, in a process of its own.

    python benchmarks/gpu_sides.py SIDE speed|context job.json

A side makes the model with random weights on the device, trains it, and answers with one JSON line:
for `speed` seconds and tokens of every round with the matrix rate measured between them, and the
peak memory; for `context` the longest document that one step of training could take.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_attention import attention_of
from jobs import memory_bytes
from speed_sides import flat, padded
from torch import Tensor

SEED = 0


@dataclass
class Job:
    """What all sides do alike.

    Attributes:
        shape: arguments of LlamaConfig.
        device: "cuda" or "cpu".
        lengths: tokens of every record, all of which train.
        batch_size: records per optimizer step.
        warmup, rounds, steps: steps that do not count; rounds of so many steps that do.
        r: rank, on all linear layers of the blocks.
        matrix: rows of the square matrices whose product gives the rate.
        longest: tokens up to which the longest context is sought.
    """

    shape: dict[str, Any]
    device: str
    lengths: list[int]
    batch_size: int
    warmup: int
    rounds: int
    steps: int
    r: int
    matrix: int
    longest: int
    notes: list[str] = field(default_factory=list)

    def record(self, length: int, number: int) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(3, self.shape["vocab_size"], (length,), generator=generator).tolist()
        return {"input_ids": words, "labels": [-100, *words[1:]]}

    def records(self) -> list[dict[str, list[int]]]:
        return [self.record(length, i) for i, length in enumerate(self.lengths)]


def make_model(job: Job, attention: str = "sdpa") -> Any:
    """A Llama of this shape with random weights, made on the device, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(**job.shape, attn_implementation=attention, use_cache=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(job.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def matrix_rate(size: int, device: str) -> float:
    """Floating-point operations per second of a bfloat16 product, the mean of ten."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> dict[str, int]:
    if device == "cpu":
        return {"peak_bytes": memory_bytes()}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def answer(found: dict) -> None:
    """Say it and end, in the midst of somebody else's training loop."""
    assert sys.__stdout__ is not None
    sys.__stdout__.write(json.dumps(found) + "\n")
    sys.__stdout__.flush()
    os._exit(0)


class Meter:
    """Counts optimizer steps; after the last round it answers."""

    def __init__(self, job: Job) -> None:
        self.job, self.left, self.tokens = job, job.warmup, 0
        self.rounds: list[dict] = []
        self.warm, self.first_loss = False, None
        self.rate = matrix_rate(job.matrix, job.device)
        self.start = time.perf_counter()

    def step(self, tokens: int, loss: float | Tensor | None = None) -> None:
        """To be called after every optimizer step, with its real (not padded) tokens."""
        if self.first_loss is None and loss is not None:
            self.first_loss = float(loss)
        self.tokens += tokens
        self.left -= 1
        if self.left:
            return
        synchronize(self.job.device)
        seconds = time.perf_counter() - self.start
        if self.warm:
            self.rounds.append({"seconds": seconds, "tokens": self.tokens, "rate": self.rate})
        self.warm = True
        if len(self.rounds) == self.job.rounds:
            found = {"rounds": self.rounds, "first_loss": self.first_loss, "notes": self.job.notes}
            answer(found | peak_memory(self.job.device))
        self.rate = matrix_rate(self.job.matrix, self.job.device)
        self.left, self.tokens = self.job.steps, 0
        self.start = time.perf_counter()


# --- Lorica ---------------------------------------------------------------------------------------


class Watcher:
    """A recorder that tells the meter of every step."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.tokens = meter, 0

    def start(self, manifest: dict) -> None: ...

    def step(self, row: dict) -> None:
        self.meter.step(row["tokens"] - self.tokens, row["loss"])
        self.tokens = row["tokens"]

    def event(self, kind: str, text: str) -> None: ...

    def finish(self, summary: dict) -> None: ...


class Lorica:
    """Lorica as it comes; `twins` False leaves the Triton kernels out, to see what they bring."""

    def __init__(self, job: Job, *, twins: bool) -> None:
        import lorica
        from lorica.ops.triton import choose

        if not twins:
            choose._able = lambda *_: False  # type: ignore[assignment]
        self.job, self.model = job, make_model(job)
        method = lorica.LoRA(r=job.r, lora_alpha=2 * job.r, target_modules="all-linear")
        self.adapter = lorica.attach(self.model, method, name="a")

    def _train(self, rows: list[dict], recorder: Any = None, **more: Any) -> None:
        from transformers import AutoTokenizer

        import lorica
        from lorica.base.locate import EMBEDDED
        from lorica.data.encode import Example
        from lorica.tasks import CausalLM

        settings = lorica.TrainSettings(
            lr_scheduler_type="constant",
            learning_rate=1e-4,
            logging_steps=1,
            seed=SEED,
            dtype="bfloat16",
            **more,
        )
        task = CausalLM.of(AutoTokenizer.from_pretrained(EMBEDDED))
        examples: Any = [Example(r["input_ids"], r["labels"], i) for i, r in enumerate(rows)]
        with tempfile.TemporaryDirectory() as folder:
            data = {self.adapter: examples}
            how: Any = {} if recorder is None else {"recorder": lambda _: recorder}
            lorica.train(
                self.model, data, settings, output_dir=Path(folder) / "run", task=task, **how
            )

    def speed(self) -> None:
        watcher = Watcher(Meter(self.job))
        batch = {"batch_size": self.job.batch_size, "max_steps": 1_000_000, "save_steps": 1_000_000}
        self._train(self.job.records(), watcher, **batch)

    def once(self, record: dict) -> None:
        self._train([record], batch_size=1, max_steps=1, gradient_checkpointing=True)


def with_peft(job: Job, model: Any, *, cast: bool) -> Any:
    """PEFT's LoRA; `cast` is its default of adapters in float32 above a base in bfloat16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=job.r, lora_alpha=2 * job.r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=cast)


class Defaults:
    """PEFT with transformers' Trainer, as their guides show it: padded batches."""

    def __init__(self, job: Job) -> None:
        self.job, self.model = job, with_peft(job, make_model(job), cast=True)
        self.model.config.pad_token_id = 0

    def _train(self, rows: Any, callbacks: list, collate: Callable, **more: Any) -> None:
        from transformers import Trainer, TrainingArguments

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                learning_rate=1e-4,
                use_cpu=self.job.device == "cpu",
                bf16=self.job.device == "cuda",
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                seed=SEED,
                dataloader_pin_memory=self.job.device == "cuda",
                **more,
            )
            how: Any = {"train_dataset": rows, "data_collator": collate, "callbacks": callbacks}
            Trainer(model=self.model, args=arguments, **how).train()

    def speed(self) -> None:
        from transformers import TrainerCallback

        seen: list[int] = []
        job = self.job

        def collate(rows: list[dict]) -> dict[str, Tensor]:
            seen.append(sum(len(row["input_ids"]) for row in rows))
            return padded(rows, True)

        class Counter(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.meter = Meter(job)

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.meter.step(seen.pop(0))

        batch = {"per_device_train_batch_size": job.batch_size, "max_steps": 1_000_000}
        self._train(job.records(), [Counter()], collate, **batch)

    def once(self, record: dict) -> None:
        how = {"per_device_train_batch_size": 1, "max_steps": 1, "gradient_checkpointing": True}
        self._train([record], [], lambda rows: padded(rows, True), **how)


class Tuned:
    """PEFT by hand: bfloat16 adapters, packed documents, flash attention, fused AdamW.

    Args:
        liger: with Liger's kernels.
        compiled: with every layer compiled.
    """

    def __init__(self, job: Job, *, liger: bool = False, compiled: bool = False) -> None:
        self.job, self.attention = job, attention_of(job.device)
        job.notes.append(f"attention: {self.attention}")
        model = make_model(job, self.attention)
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        if compiled:
            layers = model.model.layers
            for i, layer in enumerate(layers):
                layers[i] = torch.compile(layer, dynamic=True)
        self.model = with_peft(job, model, cast=False)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, rows: list[dict]) -> Tensor:
        batch: dict[str, Any] = {k: t.to(self.job.device) for k, t in flat(rows).items()}
        if self.attention != "sdpa":  # it finds the documents by their positions
            lengths = [len(row["input_ids"]) for row in rows]
            ends = torch.tensor([0, *lengths]).cumsum(0).int().to(self.job.device)
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def speed(self) -> None:
        meter = Meter(self.job)
        for rows in batches_of(self.job):
            loss = self.step(rows)
            meter.step(sum(len(row["input_ids"]) for row in rows), loss)

    def once(self, record: dict) -> None:
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer.zero_grad(set_to_none=True)  # a step that failed may have left some
        self.step([record])


def batches_of(job: Job) -> Iterator[list[dict]]:
    """The very batches that Lorica's loop makes of these records."""
    from lorica.data.pack import batches

    rows, epoch = job.records(), 0
    while True:
        how = {"batch_size": job.batch_size, "seed": SEED, "epoch": epoch}
        for chosen in batches(job.lengths, **how):
            yield [rows[i] for i in chosen]
        epoch += 1


def longest(fits: Callable[[int], bool], most: int, *, start: int, near: float = 0.05) -> int:
    """The largest length that fits, to within `near` of it; 0 where not even `start` does.

    Doubled from `start` until one does not fit or `most` is reached, then bisected.
    """
    good, bad = 0, None
    while bad is None:
        length = min(most, 2 * good or start)
        if not fits(length):
            bad = length
        elif length == most:
            return most
        else:
            good = length
    while good and bad - good > near * good:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def context(side: Any, job: Job) -> dict:
    """The longest document of which one step, with layers recomputed, fits into memory."""

    def fits(length: int) -> bool:
        try:
            side.once(job.record(length, length))
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache() if job.device == "cuda" else None

    start = min(2048, job.longest // 4)
    return {"longest_context": longest(fits, job.longest, start=start), "sought_up_to": job.longest}


SIDES: dict[str, Callable[[Job], Any]] = {
    "lorica": lambda job: Lorica(job, twins=True),
    "lorica-no-twins": lambda job: Lorica(job, twins=False),
    "peft": Defaults,
    "peft-tuned": Tuned,
    "peft-tuned-compiled": lambda job: Tuned(job, compiled=True),
    "peft-liger": lambda job: Tuned(job, liger=True),
}
NEEDS = {"peft-liger": "liger_kernel"}
"""Packages that a side needs besides those of the development install."""


def main() -> None:
    name, what, path = sys.argv[1:]
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    sys.stdout = sys.stderr  # the libraries may print; the answer goes to the real one
    side = SIDES[name](job)
    if what == "speed":
        side.speed()
    answer(context(side, job))


if __name__ == "__main__":
    main()

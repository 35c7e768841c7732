"""Lorica's side of a comparison: one job through the public API, in a process of its own.

python benchmarks/ours.py job.json         (see jobs.Job; e2e.py and glue.py write the job)
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jobs import (
    Clock,
    Job,
    Trained,
    examples_digest,
    memory_bytes,
    read_job,
    read_lines,
    write_run,
)

import lorica
from lorica.base.known import base_of
from lorica.config import Preset
from lorica.methods import WORDS
from lorica.methods.method import is_chosen
from lorica.tasks import CausalLM
from lorica.tasks.task import Task
from lorica.train.loop import default_task

PREDICT_BATCH = 64


def task_of(model, job: Job, settings) -> Task:
    if job.task != "causal-lm":
        return default_task(model, settings)
    base = base_of(model)
    assert base is not None
    base.tokenizer.eos_token = job.eos_token or base.tokenizer.eos_token
    model.generation_config.eos_token_id = base.tokenizer.eos_token_id
    return CausalLM.of(
        base.tokenizer,
        max_length=job.max_length,
        add_bos=True,  # the base was pretrained with it, though its tokenizer adds none by itself
        max_new_tokens=job.max_new_tokens,
    )


def method_of(job: Job):
    """The method that the job names, and what its name says of training (LoRA+)."""
    known = WORDS[job.method]
    values = dict(known.values) if isinstance(known, Preset) else {}
    kind: Any = known.method if isinstance(known, Preset) else known
    if job.method == "lora":
        sizes = ("r", "lora_alpha", "lora_dropout", "target_modules")
        values |= {name: getattr(job, name) for name in sizes}
    values |= job.method_settings
    if job.modules_to_save:
        values |= {"modules_to_save": tuple(job.modules_to_save)}
    own = {f.name for f in fields(kind)}
    of_training = {key: value for key, value in values.items() if key not in own}
    return kind(**{key: value for key, value in values.items() if key in own}), of_training


def main() -> None:
    job, folder = read_job()
    clock = Clock()
    write_run("lorica", job, folder, trained(job, folder, clock), clock)


def trained(job: Job, folder: Path, clock: Clock) -> Trained:
    """Train the adapter of a job in `folder`/run."""
    torch.set_num_threads(job.num_threads)
    torch.manual_seed(job.seed)  # a new head is started at random
    with clock("load"):
        model = lorica.load_model(
            job.model, task=job.task, dtype=job.dtype, labels=tuple(job.labels), device="cpu"
        )
        method, of_training = method_of(job)
    settings = lorica.TrainSettings(
        **of_training,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.lr_scheduler_type,
        warmup_ratio=job.warmup_ratio,
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        batch_size=job.batch_size,
        max_steps=job.max_steps,
        max_length=job.max_length,
        seed=job.seed,
        dtype=job.dtype,
    )
    task = task_of(model, job, settings)
    with clock("start"):  # with what records decide
        adapter = attached(model, method, task, job)
    memory_before = memory_bytes("VmRSS")
    with clock("train"):  # reading and encoding included
        data = lorica.read(job.train)
        lorica.train(model, {adapter: data}, settings, output_dir=folder / "run", task=task)
    peak = memory_bytes()

    def predict(records: list[dict], tuned: bool) -> list[dict]:
        how: dict[str, Any] = {"batch_size": PREDICT_BATCH}
        if job.task == "causal-lm" and not job.max_new_tokens:
            how["generate"] = False
        with lorica.activate(model, {adapter.name: 1.0} if tuned else None):
            return [line(one) for one in task.predict(model, records, **how)]

    examples = task.encode(data)
    rows = read_lines(folder / "run/metrics.jsonl")
    result = {
        "cpu_seconds": clock.cpu_seconds,
        "peak_memory_bytes": peak,
        "memory_before_bytes": memory_before,
        "num_trainable": adapter.num_parameters,
        "num_train_records": len(examples),
        "examples_digest": examples_digest((one.input_ids, list(one.labels)) for one in examples),
        "mean_length": sum(len(one.input_ids) for one in examples) / len(examples),
        "losses": [[row["step"], row["loss"]] for row in rows if row.get("loss") is not None],
    }
    return Trained(predict, result, folder / "run/adapter")


def attached(model, method, task: Task, job: Job):
    """The adapter on the model; what is chosen about it, by the training records."""
    if not is_chosen(method):
        return lorica.attach(model, method, name="tuned", seed=job.seed)
    examples = task.encode(lorica.read(job.train)).examples
    return lorica.attach_by_records(model, method, task, examples, name="tuned", seed=job.seed)[0]


def line(prediction) -> dict:
    return {
        "nll": prediction.nll,
        "num_tokens": prediction.num_tokens,
        "output": prediction.output,
    }


if __name__ == "__main__":
    main()

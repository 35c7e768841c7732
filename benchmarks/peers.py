"""The peer: PEFT and transformers' Trainer on one job, in a process of its own.

    python benchmarks/peers.py job.json        (see jobs.Job; e2e.py and glue.py write the job)

It is the run that PEFT's documentation teaches: fp32, padded batches, LoRA by `get_peft_model`,
AdamW of the Trainer. Only the encoding is spelled out here, so that both sides see the same tokens:
BOS, prompt, completion, EOS, with the loss on completion and EOS.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
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
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

PREDICT_BATCH = 64


def encode_completion(tokenizer, row: dict, job: Job) -> dict:
    """BOS prompt completion EOS; -100 where the loss does not count."""
    prompt = [
        tokenizer.bos_token_id,
        *tokenizer(row["prompt"], add_special_tokens=False).input_ids,
    ]
    completion = [
        *tokenizer(row["completion"], add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    ids = (prompt + completion)[: job.max_length]
    labels = ([-100] * len(prompt) + completion)[: job.max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_label(tokenizer, row: dict, job: Job) -> dict:
    texts = (row["text"], row["text_pair"]) if "text_pair" in row else (row["text"],)
    encoded = tokenizer(*texts, truncation=True, max_length=job.max_length)
    return {**encoded, "labels": job.labels.index(row["label"])}


def load(job: Job):
    """Model with adapter, and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if job.task == "causal-lm":
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
        tokenizer.eos_token = job.eos_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            job.model, num_labels=len(job.labels), dtype=job.dtype
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return get_peft_model(model, config_of(job)), tokenizer


CONFIGS = {
    "lora": (LoraConfig, {}),
    "rslora": (LoraConfig, {"use_rslora": True}),
    "adalora": (AdaLoraConfig, {}),
    "road": (RoadConfig, {}),
    "prompt-tuning": (PromptTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {}),
    "prefix-tuning": (PrefixTuningConfig, {}),
    "dora": (LoraConfig, {"use_dora": True}),
    "pissa": (LoraConfig, {"init_lora_weights": "pissa"}),
    "olora": (LoraConfig, {"init_lora_weights": "olora"}),
    "vera": (VeraConfig, {}),
    "loha": (LoHaConfig, {}),
    "lokr": (LoKrConfig, {}),
    "hira": (HiraConfig, {}),
    "ia3": (IA3Config, {}),
    "norms": (LNTuningConfig, {}),
}
"""Word of Lorica -> PEFT's config and what the word says in it."""


VIRTUAL = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)


def config_of(job: Job) -> PeftConfig:
    """PEFT's config of the job."""
    kind, values = CONFIGS[job.method]
    given = {"r": job.r, "lora_alpha": job.lora_alpha, "lora_dropout": job.lora_dropout}
    given = given if job.method == "lora" else {}
    if kind not in VIRTUAL:
        given["target_modules"] = job.target_modules
        given["modules_to_save"] = job.modules_to_save or None
    given |= {**values, **job.method_settings}
    if kind in (LoHaConfig, LoKrConfig) and "lora_alpha" in given:
        given["alpha"] = given.pop("lora_alpha")
    if kind is AdaLoraConfig:
        given["total_step"] = job.max_steps
    if kind is IA3Config:
        given |= SCALED[job.task]
    if kind is PromptEncoderConfig:
        given |= {"encoder_hidden_size": AutoConfig.from_pretrained(job.model).hidden_size}
    if kind is LNTuningConfig:
        given["target_modules"] = NORMS[job.task]
    return kind(task_type="CAUSAL_LM" if job.task == "causal-lm" else "SEQ_CLS", **given)


SCALED: dict[str, dict] = {
    "causal-lm": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "text-classification": {
        "target_modules": ["key", "value", "output.dense"],
        "exclude_modules": ["attention.output.dense"],
        "feedforward_modules": ["output.dense"],
    },
}
"""What Lorica's IA3 finds by itself."""
NORMS = {"causal-lm": ["input_layernorm", "post_attention_layernorm", "norm"]}
NORMS["text-classification"] = ["LayerNorm"]


def arguments(job: Job, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.max_steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.lr_scheduler_type,
        warmup_steps=job.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        seed=job.seed,
        train_sampling_strategy="group_by_length" if job.group_by_length else "random",
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=max(1, job.max_steps // 50),
        save_strategy="no",
    )


@torch.no_grad()
def predict_text(model, tokenizer, rows: list[dict], job: Job) -> list[dict]:
    """Greedy output and likelihood of the first reference, per record."""
    found = []
    for start in range(0, len(rows), PREDICT_BATCH):
        part = rows[start : start + PREDICT_BATCH]
        likelihoods = completion_likelihoods(model, tokenizer, part, job)
        texts = generate(model, tokenizer, part, job) if job.max_new_tokens else [None] * len(part)
        found += [
            {"nll": nll, "num_tokens": count, "output": text}
            for (nll, count), text in zip(likelihoods, texts, strict=True)
        ]
    return found


def completion_likelihoods(model, tokenizer, rows, job: Job) -> list[tuple[float, int]]:
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    batch = collate([encode_completion(tokenizer, row, job) for row in rows])
    labels = batch.pop("labels")[:, 1:]
    width = batch["input_ids"].shape[1]
    logits = model(**batch).logits[:, -width:-1]  # PEFT keeps those of virtual tokens in front
    nll = cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    return list(zip(nll.tolist(), (labels != -100).sum(1).tolist(), strict=True))


def generate(model, tokenizer, rows, job: Job) -> list[str]:
    prompts = [
        [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
        for row in rows
    ]
    width = max(map(len, prompts))
    # Generation needs the prompts flush right.
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=job.max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [
        text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    ]


@torch.no_grad()
def predict_label(model, tokenizer, rows: list[dict], job: Job) -> list[dict]:
    found = []
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), PREDICT_BATCH):
        part = rows[start : start + PREDICT_BATCH]
        batch = collate([encode_label(tokenizer, row, job) for row in part])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        nll = cross_entropy(logits, labels, reduction="none")
        found += [
            {"nll": loss, "num_tokens": 1, "output": label}
            for loss, label in zip(nll.tolist(), logits.argmax(-1).tolist(), strict=True)
        ]
    return found


def main() -> None:
    job, folder = read_job()
    clock = Clock()
    write_run("peft", job, folder, trained(job, folder, clock), clock)


def trained(job: Job, folder: Path, clock: Clock) -> Trained:
    """Train the adapter of a job, and write it to `folder`/adapter."""
    torch.set_num_threads(job.num_threads)
    causal = job.task == "causal-lm"
    encode = encode_completion if causal else encode_label
    set_seed(job.seed)
    with clock("load"):
        model, tokenizer = load(job)
    with clock("encode"):
        rows = [encode(tokenizer, row, job) for row in read_lines(job.train)]
    memory_before = memory_bytes("VmRSS")
    trainer = Trainer(
        model=model,
        args=arguments(job, folder),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        if causal
        else DataCollatorWithPadding(tokenizer),
        callbacks=[Reallocation(model)] if job.method == "adalora" else None,
    )
    with clock("train"):
        trainer.train()
    peak = memory_bytes()
    model.save_pretrained(folder / "adapter")
    model.eval()

    def predict(records: list[dict], tuned: bool) -> list[dict]:
        how = predict_text if causal else predict_label
        with nullcontext() if tuned else model.disable_adapter():
            return how(model, tokenizer, records, job)

    logged = [row for row in trainer.state.log_history if "loss" in row]
    result = {
        "cpu_seconds": clock.cpu_seconds,
        "peak_memory_bytes": peak,
        "memory_before_bytes": memory_before,
        "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_train_records": len(rows),
        "examples_digest": examples_digest(
            (row["input_ids"], row["labels"] if causal else [row["labels"]]) for row in rows
        ),
        "mean_length": float(np.mean([len(row["input_ids"]) for row in rows])),
        "losses": [[row["step"], row["loss"]] for row in logged],
    }
    return Trained(predict, result, folder / "adapter")


class Reallocation(TrainerCallback):
    """What PEFT's documentation of AdaLoRA asks for between the step and `zero_grad`."""

    def __init__(self, model) -> None:
        self.model = model

    def on_optimizer_step(self, args, state, control, **_):
        self.model.base_model.update_and_allocate(state.global_step + 1)


if __name__ == "__main__":
    main()

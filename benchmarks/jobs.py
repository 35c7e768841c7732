"""What both sides of a comparison share: the job they are given and the result they write.

A job is one fine-tuning run (model, records, settings). `run_side` gives it to a side, a script run
as a process of its own, so that its time and its peak memory are its own and no library of the
other side is loaded. A side writes `result.json` (times, memory, losses, a digest of the encoded
examples) and its predictions of base and tuned model, one JSON line per test record; the scoring
(`judge.py`) is the same for both.
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SIDES = {  # side -> its script and what it changes in the job
    "peft": ("peers.py", {}),
    "peft-grouped": ("peers.py", {"group_by_length": True}),
    "lorica": ("ours.py", {}),
}
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "sacrebleu",
    "scikit-learn",
    "rouge-score",
)


@dataclass(frozen=True)
class Job:
    """One run, given to both sides alike. Paths are strings so that the job is plain JSON.

    Attributes:
        task: "causal-lm" or "text-classification".
        model: folder of the base in transformers' layout.
        train, test: JSON lines in Lorica's canonical shapes.
        output_dir: where the side writes.
        method: a word of `lorica methods`; PEFT's side knows those of `peers.CONFIGS`.
        method_settings: of another method than LoRA, spelled as in Lorica.
        r, lora_alpha, lora_dropout, target_modules: LoRA, spelled as in PEFT.
        modules_to_save: modules trained in full beside the adapter (a new classification head).
        batch_size: records per optimizer step.
        max_length: tokens per record, cut at the end.
        max_new_tokens: for greedy generation on the test records; 0 generates nothing.
        num_threads: threads of the process.
        eos_token: ends a text instead of the tokenizer's own; empty: the tokenizer's.
        labels: names of the classes, in order of their index; empty for language models.
        group_by_length: PEFT's side only: batches of similar length (the Trainer's option).
        predict_base: whether to score the base too.
    """

    task: str
    model: str
    train: str
    test: str
    output_dir: str
    method: str = "lora"
    method_settings: dict = field(default_factory=dict)
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 16
    max_steps: int = 500
    max_length: int = 256
    max_new_tokens: int = 0
    seed: int = 0
    dtype: str = "float32"
    num_threads: int = 2
    eos_token: str = ""
    labels: list[str] = field(default_factory=list)
    group_by_length: bool = False
    predict_base: bool = True


def read_lines(path: str | Path) -> list[dict]:
    """The records of a JSON lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: str | Path, rows: Iterable[dict]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:  # another may be reading it
        path.write_text(text, encoding="utf-8")
    return path


def read_table(path: Path, *, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[dict]:
    """Rows of a CSV or TSV file; a byte-order mark is dropped."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))


def memory_bytes(what: str = "VmHWM") -> int:
    """Peak (VmHWM) or present (VmRSS) resident memory of this process.

    /proc is read rather than `ru_maxrss`, which a child inherits from the process that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status")


class Clock:
    """Named times: `with clock("train"): ...`.

    Attributes:
        seconds: on the wall.
        cpu_seconds: of all threads of this process. They tell what a run costs on a machine that
            others use too.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "Clock":
        self.name = name
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self.start
        self.seconds[self.name] = round(time.perf_counter() - wall, 3)
        self.cpu_seconds[self.name] = round(time.process_time() - cpu, 3)


@dataclass(frozen=True)
class Trained:
    """A side after its training.

    Attributes:
        predict: (records, whether the adapter acts) -> a line for each record: nll, num_tokens,
            output.
        result: times, memory, sizes, losses.
        adapter: folder of the adapter as the side writes it.
    """

    predict: Callable[[list[dict], bool], list[dict]]
    result: dict
    adapter: Path


def read_job() -> tuple[Job, Path]:
    """The job a side was started with (its one argument), and its output folder, made."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return job, folder


def run_side(side: str, job: Job, *, niceness: int = 0) -> dict:
    """Run one side on a job in a process of its own; its result with the predictions' paths."""
    folder = Path(job.output_dir) / side / f"seed-{job.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run of this benchmark
    folder.mkdir(parents=True)
    path = folder / "job.json"
    script, changes = SIDES[side]
    job = replace(job, output_dir=str(folder), **changes)
    path.write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
    environment = dict(os.environ)
    environment |= {"OMP_NUM_THREADS": str(job.num_threads), "TOKENIZERS_PARALLELISM": "false"}
    command = ["nice", "-n", str(niceness), sys.executable, str(HERE / script), str(path)]
    print(f"[{side}] seed {job.seed}: {folder}", flush=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        code = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    if code:
        tail = (folder / "log.txt").read_text(encoding="utf-8")[-3000:]
        raise SystemExit(f"{side} failed with {code}:\n{tail}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    seconds = {name: round(value, 1) for name, value in result["seconds"].items()}
    print(f"[{side}] {seconds}, peak {result['peak_memory_bytes'] / 2**20:.0f} MiB", flush=True)
    return result | {"folder": str(folder)}


def write_run(side: str, job: Job, folder: Path, trained: Trained, clock: Clock) -> None:
    """Predict the test records, and write what `run_side` reads."""
    test = read_lines(job.test)
    with clock("predict"):
        write_lines(folder / "tuned.jsonl", trained.predict(test, True))
    if job.predict_base:
        with clock("predict_base"):
            write_lines(folder / "base.jsonl", trained.predict(test, False))
    result = {"side": side, "seconds": clock.seconds, **trained.result}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def examples_digest(examples: Iterable[tuple[Sequence[int], object]]) -> str:
    """SHA-256 over (token ids, labels) of all encoded examples; both sides have to agree."""
    digest = hashlib.sha256()
    for ids, labels in examples:
        digest.update(json.dumps([list(ids), labels]).encode())
    return digest.hexdigest()


def machine(num_threads: int) -> dict:
    """Where a result was measured."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else model,
        "cores": os.cpu_count(),
        "num_threads": num_threads,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lorica", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def write_result(name: str, result: dict) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written {path}")
    return path

"""A base of a few kilobytes with its records, and training runs on it in forked processes.

Starting Python and importing torch takes longer than such a run. So this process imports them once,
and every run is a fork of it that calls the command line, and that can be stopped, starved and
killed like any other process.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as hf

import lorica.cli.run
import lorica.cli.train  # noqa: F401  so that a fork need not import them
from lorica.cli import main
from train.words import fast_tokenizer

STEPS, SAVE_STEPS = 40, 5
FLAGS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "eval_steps": 20,
    "logging_steps": 1,
    "batch_size": 4,
    "learning_rate": "1e-2",
    "r": 4,
    "lora_dropout": 0.1,
    "eval_size": 8,
    "eval_records": 4,
    "max_new_tokens": 4,
    "dtype": "float32",
}


def write_rig(folder: Path, records: int = 64) -> Path:
    """A base in `folder`/base, records in `folder`/records.jsonl."""
    tokenizer = fast_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        intermediate_size=96,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    hf.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    rows = []
    for _ in range(records):
        words = [f"w{rng.randrange(5, 97)}" for _ in range(rng.randrange(3, 9))]
        rows.append({"prompt": " ".join(words), "completion": " ".join(reversed(words))})
    write_records(folder / "records.jsonl", rows)
    return folder


def write_records(file: Path, rows: list[dict], end: str = "\n") -> Path:
    file.write_bytes("".join(json.dumps(row) + end for row in rows).encode())
    return file


def read_records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def command(rig: Path, output: Path, **changes: object) -> list[str]:
    """The line that begins a run, and goes on with it whenever it is given again."""
    flags = {
        "model": rig / "base",
        "data": rig / "records.jsonl",
        **FLAGS,
        "output_dir": output,
        "resume": output,
        **changes,
    }
    words = ["train", "--quiet"]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


@dataclass
class Run:
    """A forked process: its number, where its words go, and how it ended once `wait` returned."""

    pid: int
    output: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def over(self) -> bool:
        """Whether it has ended, without waiting. `code` is minus the signal where one ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = 120) -> int:
        """Its exit code. Raises TimeoutError for a process that hangs, and ends it."""
        until = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"no end after {seconds} s: {self.words}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    @property
    def words(self) -> str:
        """What it said on both streams."""
        return self.output.read_text(errors="replace")


def fork(work: Callable[[], object], output: Path) -> Run:
    """Run `work` in a process of its own, both its streams going into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return Run(pid, output)
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        warnings.resetwarnings()  # as in a process of its own, not as in a test
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
        # torch makes the pool of its threads anew in a fork, at first use and without a lock: of
        # two threads that load weights at once, one would find no pool. So it is made here.
        torch.set_num_threads(torch.get_num_threads())
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    except BaseException:
        with contextlib.suppress(BaseException):
            import traceback

            traceback.print_exc()
    finally:
        os._exit(code)


def start(words: list[str], output: Path, *, before: Callable[[], object] | None = None) -> Run:
    """Run a command line in a fork; `before` is called in it first, to lay a trap or a limit."""

    def work() -> None:
        if before is not None:
            before()
        main(words)

    return fork(work, output)


def finished(words: list[str], output: Path, **how) -> Run:
    """The same, waited for."""
    run = start(words, output, **how)
    run.wait()
    return run


def warm(rig: Path, scratch: Path) -> None:
    """Run a few steps in this process, so that its forks find every module imported."""
    with (
        contextlib.suppress(SystemExit),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        main(command(rig, scratch, max_steps=4, eval_steps=2, save_steps=2))


# --- what a run left ------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    """SHA-256 of the final adapter's tensors."""
    raw = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return hashlib.sha256(raw).hexdigest()


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints whose every file is as its manifest says, newest first.

    Written anew here, so that it does not believe what it tests.
    """
    found = []
    for path in (folder / "checkpoints").glob("step-*"):
        manifest = json.loads((path / "MANIFEST.json").read_bytes())
        wanted = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        there = {
            str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in path.rglob("*")
            if file.is_file() and file.name != "MANIFEST.json"
        }
        if there == wanted:
            found.append(manifest["step"])
    return sorted(found, reverse=True)


def names_of_steps(folder: Path) -> list[int]:
    """Steps that folders are named after, whole or not, newest first."""
    names = (path.name for path in (folder / "checkpoints").glob("step-*"))
    return sorted((int(name.removeprefix("step-")) for name in names), reverse=True)


def events(folder: Path) -> Iterator[str]:
    """The texts of events.jsonl."""
    for line in (folder / "events.jsonl").read_text().splitlines():
        yield json.loads(line)["text"]


def last_logged(folder: Path) -> int:
    """The newest step that metrics.jsonl has a row of; 0 where there is none."""
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        if lines:
            return json.loads(lines[-1])["step"]
    return 0


def leftovers(folder: Path) -> list[str]:
    """Temporary names that a finished run should not have left."""
    return [p.name for p in folder.rglob("*") if p.name.startswith((".tmp-", ".old-", ".bad-"))]

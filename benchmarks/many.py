"""N adapters at once: what they cost beside N runs in turn, and whether they keep their bits.

    python benchmarks/many.py [--part speed bits layouts prefix] [--adapters 1 8 64] [--threads 1]

The base is a Llama of 30 M parameters with random weights in float32; each adapter has r = 8 on
all linear layers, and three records of E2E a step. Both sides train the same adapters on the same
records: N optimizer steps in one, or one after the other. They take turns, and of each the least
processor time counts, which on one thread is what an idle machine's clock would show.

The bits are those of files: adapters that were trained together, with joins and leaves, beside the
same adapters in runs of their own. docs/many.md is written by benchmarks/many_page.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jobs import RESULTS, machine, versions, write_result
from many_bits import CASES, compared
from torch.nn import functional as F
from train_speed import e2e_texts, llama30m

import lorica
from lorica.base.known import base_of
from lorica.ops.lora import Segment, adapted_linear
from lorica.tasks import CausalLM
from lorica.train.engine import Engine, Trainee
from lorica.train.shared import SharedLayers

HERE = Path(__file__).resolve().parent
NUMBERS = (1, 2, 4, 8, 16, 64)
PER_STEP, RANK = 3, 8
REPEATS = {1: 5, 2: 5, 4: 3, 8: 3, 16: 3, 64: 2}


class Adapters:
    """Some adapters on one base, with records of their own."""

    def __init__(self, path: Path, texts: list[dict], number: int, **method: Any) -> None:
        self.model: Any = lorica.load_model(path, dtype="float32")
        self.task = CausalLM.of(base_of(self.model).tokenizer, max_length=512)  # type: ignore[union-attr]
        self.examples = self.task.encode(texts[: max(64, number) * PER_STEP]).examples
        settings = lorica.TrainSettings(learning_rate=1e-4, max_steps=1000)
        how = {"r": RANK, "target_modules": "all-linear", **method}
        self.trainees = [
            Trainee(lorica.attach(self.model, lorica.LoRA(**how), name=f"a{i}"), settings, 1000)
            for i in range(number)
        ]

    def blocks(self, *, same: bool = False) -> list[list[list]]:
        """One micro-batch of three records for each adapter."""
        starts = [0 if same else i * PER_STEP for i in range(len(self.trainees))]
        return [[self.examples[start : start + PER_STEP]] for start in starts]


def least(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The least processor seconds of each side; they take turns, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, run in sides.items():
            began = time.process_time()
            run()
            if number:
                found[name].append(time.process_time() - began)
    return {name: min(seconds) for name, seconds in found.items()}


def speed(path: Path, texts: list[dict], numbers: list[int]) -> Iterator[dict]:
    for number in numbers:
        own = Adapters(path, texts, number)
        engine, work = Engine(own.model, own.task), own.blocks()
        tokens = sum(len(e) for (block,) in work for e in block)

        def one_by_one(engine=engine, own=own, work=work) -> None:
            for trainee, batches in zip(own.trainees, work, strict=True):
                engine.step([trainee], [batches])

        sides = {
            "together": lambda engine=engine, own=own, work=work: engine.step(own.trainees, work),
            "sequential": one_by_one,
        }
        seconds = least(sides, REPEATS[number])  # type: ignore[arg-type]
        gain = seconds["sequential"] / seconds["together"]
        print(f"N = {number:2}   {tokens:5} tokens   gain {gain:.2f}", flush=True)
        yield {
            "adapters": number,
            "tokens": tokens,
            **{f"{name}_tokens_per_second": tokens / s for name, s in seconds.items()},
            "gain": gain,
        }


def prefix(path: Path, texts: list[dict]) -> Iterator[dict]:
    """The same records for all, with the upper layers adapted: the lower ones once, or for each."""
    for number in (4, 8):
        for lowest in (4, 6):
            own = Adapters(path, texts, number, layers_to_transform=list(range(lowest, 8)))
            work = own.blocks(same=True)
            layers = SharedLayers(own.model, own.task)
            sides = {
                "once": Engine(own.model, own.task, sharing=layers.shared),
                "for each": Engine(own.model, own.task),
            }
            seconds = least(
                {n: lambda e=e, o=own, w=work: e.step(o.trainees, w) for n, e in sides.items()},  # type: ignore[misc]
                3,
            )
            assert layers.passes
            gain = seconds["for each"] / seconds["once"]
            print(f"prefix N = {number}, {lowest} of 8 frozen: {gain:.2f}", flush=True)
            yield {"adapters": number, "frozen_layers": lowest, "layers": 8, "gain": gain}


def layouts() -> Iterator[dict]:
    """One adapted layer, forward and backward: a loop over segments, a grouped product, and all
    factors stacked with a gate, which does not keep the bits.
    """
    for number in (2, 8, 64):
        for length in (32, 128):
            torch.manual_seed(0)
            count, width, wide = number * length, 512, 1408
            weight = torch.randn(wide, width) / 20
            x = torch.randn(count, width).requires_grad_()
            A = torch.randn(number, RANK, width, requires_grad=True)
            B = torch.randn(number, wide, RANK, requires_grad=True)
            ends = torch.arange(1, number + 1, dtype=torch.int32) * length
            owner = torch.arange(number).repeat_interleave(length)
            gate = F.one_hot(owner, number).repeat_interleave(RANK, 1).float()

            def loop(x=x, weight=weight, A=A, B=B, length=length, number=number) -> Any:
                parts = [Segment(i * length, (i + 1) * length, A[i], B[i]) for i in range(number)]
                return adapted_linear(x, weight, None, parts)

            def grouped(x=x, weight=weight, A=A, B=B, ends=ends) -> Any:
                thin = F.grouped_mm(x, A.transpose(1, 2), offs=ends)
                return F.linear(x, weight) + F.grouped_mm(thin, B.transpose(1, 2), offs=ends)

            def stacked(x=x, weight=weight, A=A, B=B, gate=gate) -> Any:
                every = Segment(0, None, A.flatten(0, 1), B.transpose(0, 1).flatten(1), gate=gate)
                return adapted_linear(x, weight, None, [every])

            def run(forward: Callable[[], Any]) -> Callable[[], None]:
                return lambda: forward().square().sum().backward()

            sides = {"loop": run(loop), "grouped": run(grouped), "stacked": run(stacked)}
            if number == 64:
                del sides["stacked"]  # 64 times the products of one
            seconds = least(sides, 5)
            row: dict[str, Any] = {"adapters": number, "rows": length}
            row |= {n: s / seconds["loop"] for n, s in seconds.items()}
            print(f"layouts {row}", flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", default=["bits", "speed", "prefix", "layouts"])
    parser.add_argument("--adapters", nargs="+", type=int, default=list(NUMBERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    there = RESULTS / "many.json"
    found = json.loads(there.read_text()) if there.is_file() else {}
    found |= {"machine": machine(options.threads), "versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.part:
            if part == "bits":
                rows = (compared(case, Path(folder)) for case in CASES)
            elif part == "layouts":
                rows = layouts()
            else:
                texts = e2e_texts(options.data)
                path = Path(folder) / "model"
                path = path if path.exists() else llama30m(path)
                numbers = options.adapters
                rows = speed(path, texts, numbers) if part == "speed" else prefix(path, texts)
            known = found.pop(part, []) if part == "speed" else []
            found[part] = []
            for row in rows:  # each is written as soon as it is known
                known = [one for one in known if one["adapters"] != row["adapters"]]
                found[part].append(row)
                write_result("many", {**found, part: [*known, *found[part]]})


if __name__ == "__main__":
    main()

"""How the cost of a training step grows: with tokens, documents, rank, layers and vocabulary.

    python benchmarks/growth.py                    # every axis
    python benchmarks/growth.py rank layers --rounds 9

A small Llama of random weights is changed along one axis at a time. The steps of all points of an
axis are taken in turn, round by round. Printed are medians of seconds per step, and what a step at
the point costs as a multiple of one at the first point, beside the multiple of the matrix products'
operations: where the first grows faster than the second, something else costs.
"""

import argparse
import os
import statistics
import time

import torch
from jobs import machine, versions, write_result
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorica
from lorica.base.locate import EMBEDDED
from lorica.data.encode import Example
from lorica.tasks import CausalLM
from lorica.train.engine import Engine, Trainee

USUAL = {"documents": 16, "length": 64, "rank": 8, "layers": 4, "vocabulary": 4096}
WIDTH, INNER, HEADS = 256, 704, 4
AXES: dict[str, list[dict[str, int]]] = {
    "tokens": [{"documents": n} for n in (8, 16, 32, 64)],
    "documents of one batch of 2,048 tokens": [
        {"documents": 2048 // n, "length": n} for n in (512, 128, 32, 8)
    ],
    "rank": [{"rank": n} for n in (4, 16, 64, 256)],
    "layers": [{"layers": n} for n in (2, 4, 8, 16)],
    "vocabulary": [{"vocabulary": n} for n in (1024, 4096, 16384, 65536)],
}


class Point:
    """A model with an adapter, and one batch."""

    def __init__(self, changed: dict[str, int]) -> None:
        self.shape = USUAL | changed
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.shape["vocabulary"],
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=self.shape["layers"],
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
        )
        model = LlamaForCausalLM(config).requires_grad_(False)
        method = lorica.LoRA(r=self.shape["rank"], target_modules="all-linear")
        adapter = lorica.attach(model, method, name="a")
        self.linear = sum(m.weight.numel() for m in model.modules() if hasattr(m, "in_features"))
        self.lora = sum(p.numel() for p in adapter.parameters())
        settings = lorica.TrainSettings(max_steps=10**6, batch_size=self.shape["documents"])
        self.engine = Engine(model, CausalLM.of(AutoTokenizer.from_pretrained(EMBEDDED)))
        self.trainee = Trainee(adapter, settings, 10**6)
        count, length = self.shape["documents"], self.shape["length"]
        ids = torch.randint(5, 1000, (count, length)).tolist()
        self.batch = [Example(row, row, i) for i, row in enumerate(ids)]

    def step(self) -> float:
        start = time.perf_counter()
        self.engine.step([self.trainee], [[self.batch]])
        return time.perf_counter() - start

    @property
    def operations(self) -> int:
        """Of the matrix products: 4 per frozen weight and token, 6 per weight of the adapter; of
        attention 14 per pair of positions that see each other and feature.
        """
        tokens = self.shape["documents"] * self.shape["length"]
        pairs = tokens * self.shape["length"] // 2
        return (
            tokens * (4 * self.linear + 6 * self.lora) + 14 * pairs * WIDTH * self.shape["layers"]
        )


def measure(changes: list[dict[str, int]], rounds: int) -> list[dict]:
    """One axis."""
    points = [Point(changed) for changed in changes]
    seconds: list[list[float]] = [[] for _ in points]
    for number in range(rounds + 1):
        for point, own in zip(points, seconds, strict=True):
            spent = point.step()
            if number:
                own.append(spent)
    middle = [statistics.median(own) for own in seconds]
    return [
        {
            **changed,
            "seconds": spent,
            "slowest": max(own),
            "fastest": min(own),
            "times": spent / middle[0],
            "operations_times": point.operations / points[0].operations,
        }
        for changed, point, spent, own in zip(changes, points, middle, seconds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words = {name.split()[0]: name for name in AXES}
    parser.add_argument("axes", nargs="*", help=f"of {', '.join(words)}; all where none is named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default="growth", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    result = {
        "machine": machine(options.num_threads),
        "versions": versions(),
        "rounds": options.rounds,
        "usual": USUAL | {"width": WIDTH, "inner": INNER},
        "axes": {},
    }
    for word in options.axes or words:
        name = words[word]
        found = measure(AXES[name], options.rounds)
        result["axes"][name] = found
        print(f"\n{name}\n{'':24}{'s / step':>10}{'times':>8}{'operations':>12}")
        for row in found:
            label = ", ".join(f"{k} {row[k]:,}" for k in USUAL if k in row)
            print(
                f"{label:24}{row['seconds']:>10.4f}{row['times']:>7.1f}x"
                f"{row['operations_times']:>11.1f}x"
            )
    write_result(options.name, result)


if __name__ == "__main__":
    main()

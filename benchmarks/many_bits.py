"""Adapters that were trained together beside the same adapters in runs of their own, bit by bit.

Each case is a list of adapters with a rank, a learning rate, a batch size and what else differs;
some leave before their last step, some join when another has ended. All files of all adapters are
compared. The base is a small Llama with random weights.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorica
from lorica.tasks import CausalLM
from lorica.train.director import Evaluation, Newcomer
from lorica.train.loop import train

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from architectures import ARCHITECTURES  # noqa: E402
from train.words import WordTokenizer, examples  # noqa: E402

RANKS = (2, 5, 12, 4, 8, 3, 10, 6)


@dataclass(frozen=True)
class Case:
    """What trains together.

    Attributes:
        number: adapters in all.
        dtype: of the base.
        dropout: of every second adapter.
        accumulation: micro-batches per step of every second adapter.
        moves: the second leaves after two steps, and the last joins when the first has ended.
        targets: of every second adapter; the others have all linear layers.
    """

    number: int
    dtype: str = "float32"
    dropout: float = 0.0
    accumulation: int = 1
    moves: bool = False
    targets: str = "all-linear"

    def named(self) -> list[str]:
        return [f"a{i}" for i in range(self.number)]

    def method(self, name: str) -> lorica.LoRA:
        odd = int(name[1:]) % 2
        targets: Any = self.targets if not odd or self.targets == "all-linear" else ["q_proj"]
        return lorica.LoRA(
            r=RANKS[int(name[1:]) % 8],
            target_modules=targets if odd else "all-linear",
            lora_dropout=self.dropout if odd else 0.0,
        )

    def settings(self, name: str) -> lorica.TrainSettings:
        i = int(name[1:])
        return lorica.TrainSettings(
            learning_rate=1e-2 / (1 + i),
            batch_size=1 + i % 4,
            gradient_accumulation_steps=self.accumulation if i % 2 else 1,
            max_steps=3 + i % 3,
            eval_steps=2,
            save_steps=3,
            lr_scheduler_type="cosine" if i % 2 else "linear",
            seed=i,
            keep_best=False,
        )

    def data(self, name: str) -> list:
        return examples(20 + int(name[1:]), 9)


CASES = [
    *(Case(n) for n in (2, 3, 8)),
    *(Case(n, moves=True) for n in (3, 8)),
    *(Case(n, accumulation=3, moves=True) for n in (3, 8)),
    *(Case(n, dropout=0.2, moves=n > 2) for n in (2, 3, 8)),
    Case(3, targets="some", moves=True),
    *(Case(n, dtype="bfloat16", dropout=0.2, moves=n > 2) for n in (2, 3, 8)),
]


@dataclass
class Moves:
    """The director of a case with moves."""

    case: Case
    model: torch.nn.Module
    joined: bool = False

    def judge(self, evaluation: Evaluation) -> str | None:
        return "cut" if (evaluation.name, evaluation.step) == ("a1", 2) else None

    def newcomers(self, standing: dict) -> list[Newcomer]:
        if self.joined or not standing["a0"]:
            return []
        self.joined = True
        return [self.again(self.case.named()[-1])]

    def again(self, name: str) -> Newcomer:
        adapter = lorica.attach(self.model, self.case.method(name), name=name, seed=int(name[1:]))
        case = self.case
        return Newcomer(adapter, case.data(name), case.settings(name), examples(3, 4))

    @property
    def state(self) -> dict:
        return {"joined": self.joined}

    def restore(self, state: dict) -> None:
        self.joined = state["joined"]


def trained(case: Case, names: list[str], folder: Path, *, moves: bool) -> dict[str, bytes]:
    """The file of every adapter, by name."""
    shutil.rmtree(folder, ignore_errors=True)
    model = ARCHITECTURES["llama"].build().to(getattr(torch, case.dtype))
    director = Moves(case, model) if moves else None
    given = names[:-1] if moves else names
    handles = {
        name: lorica.attach(model, case.method(name), name=name, seed=int(name[1:]))
        for name in given
    }
    with contextlib.redirect_stdout(None):
        report = train(
            model,
            {name: case.data(name) for name in handles},
            {name: case.settings(name) for name in handles},
            output_dir=folder,
            eval_data=examples(3, 4),
            task=CausalLM.of(WordTokenizer()),
            director=director,
        )
    files = {n: next(f.glob("*.safetensors")).read_bytes() for n, f in report.folders.items()}
    return {name: data for name, data in files.items() if not report.stopped[name]}


def compared(case: Case, folder: Path) -> dict[str, Any]:
    """How many adapters came out to the last bit as alone; who was cut short is left out."""
    together = trained(case, case.named(), folder / "together", moves=case.moves)
    equal = sum(
        trained(case, [name], folder / "alone", moves=False)[name] == data
        for name, data in together.items()
    )
    row = {
        "adapters": case.number,
        "ranks": sorted({case.method(name).r for name in case.named()}),
        "dtype": case.dtype,
        "dropout": case.dropout,
        "accumulation": case.accumulation,
        "moves": case.moves,
        "targets": case.targets,
        "compared": len(together),
        "equal": equal,
    }
    print(row, flush=True)
    return row

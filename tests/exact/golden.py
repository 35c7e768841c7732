"""The golden loss curve: a run of the embedded base that must not change unnoticed.

    python tests/exact/golden.py      # writes golden.json anew: after a change that is meant

Every part of a run is in it: records read and encoded, packing, dropout, accumulation, clipping,
warm-up and decay, evaluation. In float64, so that the curve is the same on every machine: what
differs by more than 1e-6 is a change of what is computed, not of the order of a sum. Whoever writes
it anew says in the change why the numbers moved.
"""

import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

import lorica
from lorica.config import TrainSettings

FILE = Path(__file__).with_name("golden.json")
ANIMALS = ("cat", "dog", "owl", "bee", "fox", "hen", "cow")
SETTINGS = TrainSettings(
    learning_rate=1e-2,
    batch_size=3,
    gradient_accumulation_steps=2,
    max_steps=20,
    warmup_steps=4,
    lr_scheduler_type="cosine",
    weight_decay=0.01,
    eval_steps=10,
    logging_steps=1,
    max_length=48,
    seed=11,
)


def records(first: int, number: int) -> list[dict[str, str]]:
    """Prompts and completions of unequal length."""
    made = []
    for i in range(first, first + number):
        animal, other = ANIMALS[i % 7], ANIMALS[(3 * i + 1) % 7]
        prompt = f"Who saw the {animal} " + "again and " * (i % 4) + "again?"
        made.append({"prompt": prompt, "completion": f" The {other} saw it {i} times."})
    return made


def curve(folder: Path) -> dict[str, list[float]]:
    """Loss, gradient norm and learning rate of every step, and the evaluation losses."""
    model = lorica.load_model("embedded", dtype="float32").double()
    method = lorica.LoRA(r=4, target_modules="all-linear", lora_dropout=0.05)
    adapter = lorica.attach(model, method, name="golden", seed=11)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.double()
    lorica.train(
        model, {"golden": records(0, 50)}, SETTINGS, output_dir=folder, eval_data=records(50, 9)
    )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return {name: [row[name] for row in rows if name in row] for name in names}


def largest_error(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> float:
    """Relative, over all numbers of both."""
    pairs = [(a, b) for name in wanted for a, b in zip(found[name], wanted[name], strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


if __name__ == "__main__":
    made = curve(Path(tempfile.mkdtemp()) / "run")
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE}: loss {made['loss'][0]:.4f} to {made['loss'][-1]:.4f}")

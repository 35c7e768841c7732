"""Settings, manifest and rows of a made-up but realistic run."""

import math
import random
from collections.abc import Iterator

CONFIG = """# lorica train
model: models/stories260k   # flag --model
data:
  path: e2e/trainset.csv    # flag --data
  columns: {prompt: mr, completion: ref}  # rule: the columns mr and ref
method:
  r: 8                      # flag --r
  lora_dropout: 0.0         # default
  target_modules:           # file run.yaml
    - q_proj
    - v_proj
train:
  learning_rate: 5e-3       # file run.yaml
  note: 'a # in quotes'     # default
  early_stopping_patience:
seed: 0
"""

SCORES = {
    "chrf": {
        "base": 12.31,
        "tuned": 45.62,
        "difference": 33.31,
        "low": 31.02,
        "high": 35.48,
        "p": 0.0002,
        "num_records": 630,
        "higher_is_better": True,
    },
    "perplexity": {
        "base": 92.13,
        "tuned": 3.42,
        "difference": -88.71,
        "low": -93.9,
        "high": -84.1,
        "p": 0.0002,
        "num_records": 630,
        "higher_is_better": False,
    },
}

SAMPLES = [
    {
        "input": "name[Blue Spice], area[riverside]",
        "before": "Once upon a time there was a girl.",
        "after": "Blue Spice is a lovely pub in riverside.",
        "references": ["A pub called Blue Spice.", "Blue Spice is a pub in riverside."],
    },
    {"input": "name[Cocum]", "before": "", "after": "Cocum", "references": []},
]


def manifest_for(*adapters: str) -> dict:
    single = len(adapters) == 1
    return {
        "lorica": "0.1.0",
        "run": {"path": "runs/e2e"},
        "versions": {"lorica": "0.1.0", "torch": "2.13.0"},
        "base": {
            "name": "models/stories260k",
            "digest": "sha256:5b1c",
            "num_parameters": 260_032,
            "dtype": "float32",
            "architecture": "LlamaForCausalLM",
        },
        "data": {
            "train": {
                "path": "e2e/trainset.csv",
                "num_records": 4_207,
                "digest": "sha256:8d5f",
                "format": "prompt",
                "statement": "CSV with the columns mr and ref",
                "num_tokens": 189_301,
                "num_trained_tokens": 98_121,
                "length_percentiles": {"p50": 43, "p95": 76, "max": 131},
                "num_truncated": 3,
                "length_histogram": {"edges": [0, 50, 100, 150], "counts": [2_000, 2_200, 7]},
                "example": [["<s>", False], ["name[X]\n", False], ["X is a", True], [" pub", True]],
            }
        },
        "seed": 0,
        "task": "causal-lm",
        "method": {"kind": "lora", "r": 8},
        "adapters": {
            name: {"num_parameters": 24_576, "path": "adapter" if single else f"adapters/{name}"}
            for name in adapters
        },
        "plan": {"max_steps": 200, "epochs": 2, "batch_size": 16},
    }


def rows_for(adapter: str, num_steps: int, seed: int = 0) -> Iterator[dict]:
    noise = random.Random(seed)
    for step in range(5, num_steps + 1, 5):
        row = {
            "step": step,
            "epoch": step / 100,
            "adapter": adapter,
            "loss": 1.2 + 2.4 * math.exp(-step / 40) + noise.gauss(0, 0.05),
            "learning_rate": 5e-3 * (1 - step / 210),
            "grad_norm": 0.5 + abs(noise.gauss(0, 0.1)),
            "tokens": 912 * step,
            "tokens_per_second": 4_700.0,
            "memory_bytes": 1.2e9,
        }
        if step % 50 == 0:
            row["eval_loss"] = 1.25 + 2.3 * math.exp(-step / 40)
            row["eval_chrf"] = 46 * (1 - math.exp(-step / 100))
        yield row

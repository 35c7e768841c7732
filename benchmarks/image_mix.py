"""Two adapters of a small image model, mixed at 0, 0.5 and 1: bold strokes and a slant, measured.

    python benchmarks/image_mix_base.py --data mnist --output-dir runs/digits
    python benchmarks/image_mix.py --data mnist --base runs/digits --output-dir runs/image_mix

Trains an adapter on digits with bold strokes and one on slanted digits with `lorica train`, draws
every digit at every pair of weights from the same noise, and measures on the pictures how much ink
there is and how slanted it is. One core, minutes; writes results.json and grid.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from image_mix_base import WORDS, coloured, digits, slanted
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import lorica
from lorica.tasks.drawing import draw

WEIGHTS = (0.0, 0.5, 1.0)
WHITE = torch.ones(3)
SLANT = 0.7
"""Pixels to the right for every pixel up."""
FIRST = 30_000
"""Records before it made the base."""
COMMAND = [sys.executable, "-c", "import sys; from lorica.cli import main; main(sys.argv[1:])"]


def write_data(folder: Path, images: Tensor, labels: Tensor) -> None:
    """Pictures (n, 3, 32, 32) from 0 to 1 with captions, as `lorica train` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for i, (image, label) in enumerate(zip(numbers, labels.tolist(), strict=True)):
            Image.fromarray(image).save(folder / f"{i:04d}.png")
            row = {"file_name": f"{i:04d}.png", "text": f"a {WORDS[label]}"}
            file.write(json.dumps(row) + "\n")


def bold(ink: Tensor) -> Tensor:
    """Images (n, 32, 32) with strokes that are a pixel wider on each side."""
    return F.max_pool2d(ink[:, None], 3, stride=1, padding=1)[:, 0]


def how_bold(picture: np.ndarray) -> float:
    """The share of a picture (h, w, 3) that is ink."""
    return float(picture.max(-1).mean())


def how_slanted(picture: np.ndarray) -> float:
    """Pixels to the right per pixel up, by the second moments of the ink."""
    ink = picture.max(-1)
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]].astype(float)
    total = ink.sum().clip(1e-6)
    x, y = x - (x * ink).sum() / total, y - (y * ink).sum() / total
    return float(-(x * y * ink).sum() / (y * y * ink).sum().clip(1e-6))


def command(*words: object) -> None:
    subprocess.run([*COMMAND, *map(str, words)], check=True)


def train_adapter(base: Path, data: Path, folder: Path, steps: int) -> None:
    settings = {"task": "text-to-image", "model": base, "data": data, "output-dir": folder}
    settings |= {"r": 8, "max-steps": steps, "batch-size": 16, "learning-rate": 3e-3}
    settings |= {"dtype": "float32", "threads": 1, "eval-size": 32, "num-samples": 6}
    settings |= {"guidance-scale": 2.0, "num-inference-steps": 20, "logging-steps": 20}
    settings |= {"keep-best": "false"}  # a style shows in pictures later than in the loss
    command("train", "--quiet", *(w for k, v in settings.items() for w in (f"--{k}", v)))


def measured(model, mixture: dict[str, float], number: int) -> dict[str, float]:
    """Means over `number` pictures of every digit, with standard errors."""
    prompts = [f"a {word}" for word in WORDS for _ in range(number)]
    seeds = [1000 * digit + i for digit in range(len(WORDS)) for i in range(number)]
    with lorica.activate(model, mixture):
        how = {"seeds": seeds, "num_inference_steps": 20, "guidance_scale": 2.0}
        pictures = draw(model, prompts, **how)
    arrays = [np.asarray(p, dtype=float) / 255 for p in pictures]
    found = [(how_bold(a), how_slanted(a)) for a in arrays]
    means = np.mean(found, axis=0)
    errors = np.std(found, axis=0, ddof=1) / len(found) ** 0.5
    names = ("ink", "slant")
    return {
        **dict(zip(names, map(float, means), strict=True)),
        **{f"{n}_error": float(e) for n, e in zip(names, errors, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--number", type=int, default=2, help="pictures of each digit in a cell")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ink, labels = digits("train", given.data)
    ink, labels = ink[FIRST : FIRST + 512], labels[FIRST : FIRST + 512]
    sets = {
        "bold": coloured(bold(ink), WHITE),
        "slanted": coloured(slanted(ink, SLANT), WHITE),
    }
    began, root = time.process_time(), given.output_dir
    for name, images in sets.items():
        if not (root / name / "adapter").is_dir():
            write_data(root / "data" / name, images, labels)
            train_adapter(given.base, root / "data" / name, root / name, given.steps)
    model = lorica.load_model(given.base, task="text-to-image", dtype="float32")
    for name in sets:
        lorica.load_adapter(model, root / name / "adapter", name=name)
    cells = []
    for slant in WEIGHTS:
        for strokes in WEIGHTS:
            mixture = {"bold": strokes, "slanted": slant}
            cells.append({**mixture, **measured(model, mixture, given.number)})
            print(json.dumps(cells[-1]), flush=True)
    data = {
        name: {
            "ink": float(np.mean([how_bold(a) for a in _arrays(images)])),
            "slant": float(np.mean([how_slanted(a) for a in _arrays(images)])),
        }
        for name, images in {"base": coloured(ink, WHITE), **sets}.items()
    }
    result = {"cells": cells, "data": data, "pictures_per_cell": 10 * given.number}
    result["drawing_seconds"] = time.process_time() - began
    (root / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    adapters = f"{root / 'bold'},{root / 'slanted'}"
    how = ("--num-inference-steps", 20, "--guidance-scale", 2.0, "--dtype", "float32")
    command(
        *("grid", given.base, "--adapters", adapters, "--weights", "0,0.5,1", "--overwrite"),
        *("--prompt", "a zero", "--output", root / "grid.png", *how),
    )


def _arrays(images: Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).numpy().astype(float))


if __name__ == "__main__":
    main()

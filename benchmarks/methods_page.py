"""docs/methods.md, with its pictures, from the figures in benchmarks/results/methods-*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs import RESULTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/methods.md"
HEAD = """# Methods, measured

`lorica methods` lists them; `lorica train --method WORD` and `method: WORD` in YAML take any.
This page is written by `benchmarks/methods.py`, which measures every method on the same records,
beside PEFT where it has the method; run it again to have it for your machine.
"""


def write_page() -> None:
    """Write the page and a picture for each set of figures."""
    parts = [HEAD]
    for path in sorted(RESULTS.glob("methods-*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        picture = ROOT / "docs/images" / f"{path.stem}.svg"
        plot(figures, picture)
        parts.append("\n".join(section(figures, picture.name)))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"written {PAGE}")


def section(figures: dict[str, Any], picture: str) -> list[str]:
    """One table."""
    head = (
        "method",
        "trained",
        "accuracy",
        "worst",
        "s.d.",
        "PEFT",
        "time / LoRA",
        "memory",
        "rate",
    )
    lora = figures["methods"].get("lora", {}).get("sides", {}).get("lorica", {})
    lines = [
        f"## {figures['title']}",
        "",
        f"{figures['max_steps']} steps of {figures['batch_size']} records, {len(figures['seeds'])} "
        f"seeds; median accuracy on {_any(figures)['num_test']} records, the worst seed, the "
        "standard deviation over seeds; time of training as a multiple of LoRA's.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for word, own in figures["methods"].items():
        ours, theirs = own["sides"]["lorica"], own["sides"].get("peft")
        times = ours["train_seconds"] / lora["train_seconds"] if lora else 1.0
        cells = (
            word,
            f"{ours['num_trainable']:,}",
            f"{ours['accuracy_median']:.3f}",
            f"{ours['accuracy_worst']:.3f}",
            f"{ours['accuracy_sd']:.3f}",
            peft_cell(theirs, ours),
            f"{times:.2f}",
            f"{ours['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{own['learning_rate']:g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    cpu = figures["machine"]
    packages = ", ".join(f"{k} {figures['versions'][k]}" for k in ("torch", "transformers", "peft"))
    return [
        *lines,
        "",
        "PEFT: its median accuracy, and its time as a multiple of ours.",
        "",
        f"![accuracy over the number of trained parameters](images/{picture})",
        "",
        f"{figures['date']}, {cpu['cpu']}, {cpu['num_threads']} thread(s); {packages}.",
        "",
    ]


def _any(figures: dict[str, Any]) -> dict[str, Any]:
    return next(iter(figures["methods"].values()))["sides"]["lorica"]


def peft_cell(theirs: dict | None, ours: dict) -> str:
    if theirs is None:
        return "-"
    return (
        f"{theirs['accuracy_median']:.3f}, {theirs['train_seconds'] / ours['train_seconds']:.1f}x"
    )


def plot(figures: dict[str, Any], path: Path) -> None:
    """Accuracy over the number of trained parameters, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lorica"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    for word, own in figures["methods"].items():
        side = own["sides"]["lorica"]
        middle, x = side["accuracy_median"], side["num_trainable"]
        spread = [[middle - side["accuracy_worst"]], [side["accuracy_best"] - middle]]
        axes.errorbar([x], [middle], yerr=spread, fmt="o", ms=4, capsize=2, lw=0.8)
        axes.annotate(word, (x, middle), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("accuracy: median, worst and best seed")
    axes.set_title(figures["title"], fontsize=9)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)

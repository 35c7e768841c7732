"""docs/methods.md, with its pictures, from the figures in benchmarks/results/methods-*.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import RESULTS
from methods_plot import svg
from methods_words import HEAD, advice, properties

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/methods.md"
COLUMNS = (
    "method",
    "trained",
    "file, KB",
    "{score} [95 %]",
    "seeds",
    "- LoRA [95 %]",
    "step",
    "start, s",
    "memory, MiB",
    "rate",
)


def load() -> dict[str, dict[str, Any]]:
    """Task -> its figures."""
    return {
        path.stem.removeprefix("methods-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("methods-*.json"), reverse=True)
    }


def write_page() -> None:
    """Write the page and a picture for each set of figures."""
    found = load()
    for task, figures in found.items():
        picture = ROOT / "docs/images" / f"methods-{task}.svg"
        picture.write_text(svg(figures), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")


def page() -> str:
    """The text of docs/methods.md, from the figures that there are."""
    found = load()
    of_base = json.loads((RESULTS / "e2e.json").read_text(encoding="utf-8"))
    base_loss = of_base["sides"]["lorica"][0]["base_scores"]["loss"]["value"]
    parts = [HEAD, "\n".join(advice(found, base_loss)), "\n".join(properties())]
    parts += ["\n".join(section(task, figures)) for task, figures in found.items()]
    return "\n".join(parts)


def section(task: str, figures: Mapping[str, Any]) -> list[str]:
    """The table of one task, its picture, and what can be told apart in it."""
    methods, budget = figures["methods"], figures["budget"]
    loss = figures["metric"] == "loss"
    word = "loss" if loss else "accuracy"
    lora = methods["lora"]["sides"]["lorica"]
    lines = [
        f"## {figures['title']}",
        "",
        f"{budget['num_train']} training records, {budget['max_steps']} steps of "
        f"{budget['batch_size']}; the rate is the best of three to five by the loss on "
        f"{budget['num_tuning']} other records with the first seed; scored on "
        f"{budget['num_test']} test records with seeds {_listed(budget['seeds'])}. "
        + ("Loss in nats per token of the first reference: lower is better." if loss else ""),
        "",
        f"![{word} over trained parameters](images/methods-{task}.svg)",
        "",
        f"| {' | '.join(COLUMNS).format(score=word)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    ranked = sorted(
        methods.items(), key=lambda item: item[1]["sides"]["lorica"]["score"] * (1 if loss else -1)
    )
    lines += [_line(name, own, lora, loss) for name, own in ranked]
    if figures["not_run"]:
        lines += ["", f"Not run here: {_listed(figures['not_run'])}."]
    lines += ["", _where(figures), "", "### Told apart from LoRA", "", *_apart(methods, loss)]
    lines += ["", "### Relevance beside chance", "", *_relevance(methods, loss)]
    lines += ["", "### Beside PEFT", "", *_peers(methods, loss, budget), ""]
    return lines


def _line(name: str, own: Mapping[str, Any], lora: Mapping[str, Any], loss: bool) -> str:
    side = own["sides"]["lorica"]
    values = sorted(side["by_seed"])
    against = side["against"].get("lora")
    cells = (
        name,
        f"{side['num_trainable']:,}",
        f"{side['adapter_bytes'] / 1000:,.0f}",
        _with_interval(side["score"], side["interval"]),
        f"{values[0]:.3f} to {values[-1]:.3f}",
        _signed(against) if against else "",
        f"{side['step_seconds'] / lora['step_seconds']:.2f}",
        f"{side['start_seconds']:.1f}" if side["start_seconds"] >= 0.05 else "",
        f"{side['peak_memory_bytes'] / 2**20:,.0f}",
        f"{own['learning_rate']:.2g}",
    )
    return f"| {' | '.join(cells)} |"


def _with_interval(score: float, interval: list[float]) -> str:
    return f"{score:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _signed(against: Mapping[str, Any]) -> str:
    low, high = against["interval"]
    mark = "" if low <= 0 <= high else " *"
    return f"{against['difference']:+.3f} [{low:+.3f}, {high:+.3f}]{mark}"


def _where(figures: Mapping[str, Any]) -> str:
    machine, packages = figures["machine"], figures["versions"]
    lora = figures["methods"]["lora"]["sides"]["lorica"]["step_seconds"]
    names = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft"))
    return (
        f"step: CPU seconds of a step as a multiple of LoRA's {lora:.3f} s. Measured on "
        f"{figures['date']}, {machine['cpu']}, {machine['num_threads']} thread, float32; {names}."
    )


def _apart(methods: Mapping[str, Any], loss: bool) -> list[str]:
    """Methods whose interval of the difference leaves out 0."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "level": []}
    for name, own in methods.items():
        against = own["sides"]["lorica"]["against"].get("lora")
        if against is None:
            continue
        low, high = against["interval"]
        if low <= 0 <= high:
            found["level"].append(name)
        else:
            found["better" if (high < 0) == loss else "worse"].append(name)
    return [
        f"- better: {_listed(found['better']) or 'none'}",
        f"- worse: {_listed(found['worse']) or 'none'}",
        f"- within the noise of records and seeds: {_listed(found['level']) or 'none'}",
        "",
        f"Of {sum(map(len, found.values()))} comparisons at 95 %, about one in twenty would leave "
        "out 0 by chance alone: what lies close to it is no finding.",
    ]


def _relevance(methods: Mapping[str, Any], loss: bool) -> list[str]:
    """Selections at the same budget, each against the random one."""
    lines = ["| chosen by | entries | score [95 %] | - random [95 %] |", "|---|---|---|---|"]
    for name, own in methods.items():
        if not name.startswith("sparse"):
            continue
        side = own["sides"]["lorica"]
        against = side["against"].get("random")
        cells = (
            name.removeprefix("sparse: ").replace("sparse rows:", "whole rows,"),
            f"{side['num_trainable']:,}",
            _with_interval(side["score"], side["interval"]),
            _signed(against) if against else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "A lower loss is better here." if loss else "The head trains besides."]


def _peers(methods: Mapping[str, Any], loss: bool, budget: Mapping[str, Any]) -> list[str]:
    """PEFT and its trainer at the same records, steps and rate."""
    rows = [(name, own["sides"]) for name, own in methods.items() if "peft" in own["sides"]]
    if not rows:
        return ["Not run on this task."]
    lines = [
        f"PEFT and the Trainer of transformers at the same rate; seeds "
        f"{_listed(budget['peft_seeds'])}, and Lorica's score is of the same. Starts are each "
        "library's own: PEFT's virtual tokens begin as noise of size 1, Lorica's as tokens of the "
        "vocabulary or as faint noise. Equal starts give equal outputs ([beside PEFT](parity.md)).",
        "",
        "| method | Lorica | PEFT | step, Lorica s | step, PEFT s | MiB, Lorica | MiB, PEFT |",
        "|---|---|---|---|---|---|---|",
    ]
    count = len(budget["peft_seeds"])
    for name, sides in rows:
        ours, theirs = sides["lorica"], sides["peft"]
        cells = (
            name,
            f"{sum(ours['by_seed'][:count]) / count:.3f}",
            f"{theirs['score']:.3f}",
            f"{ours['step_seconds']:.3f}",
            f"{theirs['step_seconds']:.3f}",
            f"{ours['peak_memory_bytes'] / 2**20:,.0f}",
            f"{theirs['peak_memory_bytes'] / 2**20:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _listed(words: Any) -> str:
    return ", ".join(map(str, words))

"""The page of a search: one self-contained HTML file in the dress of a run's report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.errors import DataError
from lorica.records.atomic import write_file
from lorica.records.card import shell_line
from lorica.records.folder import REPORT, RUN_YAML, SEARCH
from lorica.records.phrases import count, duration, loss_text, number, parameters, size
from lorica.records.report import environment
from lorica.records.search_figures import (
    curves_figure,
    importance_figure,
    pareto_figure,
    ranks_figure,
    spectrum_figure,
)
from lorica.records.sections import HERE

Found = Mapping[str, Any]


def write_search_page(folder: str | Path, *, output: str | Path | None = None) -> Path:
    """Write report.html of a search that has found its answer.

    Raises:
        DataError: the folder holds no search.json that can be read.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / SEARCH).read_text("utf-8"))
        run_yaml = (folder / RUN_YAML).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no answer of a search: {error}",
            expected=f"{SEARCH} and {RUN_YAML}, written by lorica search",
        ) from error
    content = page_content(found, run_yaml, folder)
    text = environment().get_template("search.html.jinja").render(content)
    target = Path(output) if output is not None else folder / REPORT
    return write_file(target, text.encode("utf-8"))


def page_content(found: Found, run_yaml: str, folder: Path) -> dict[str, Any]:
    """What the template prints."""
    by_number = {c["number"]: c for c in found["candidates"]}
    chosen = by_number[found["chosen"]]
    failed = [c for c in found["candidates"] if c["outcome"] == "failed"]
    step = found["importance"]["step"]
    return {
        "css": (HERE / "report.css").read_text("utf-8"),
        "title": folder.absolute().name,
        "status": "finished",
        "facts": _facts(found),
        "headline": f"{chosen['words']}",
        "sentence": found["sentence"][:1].upper() + found["sentence"][1:],
        "chosen": chosen["name"],
        "chosen_loss": loss_text(chosen["loss"]),
        "alarms": [
            f"{c['name']} ({c['words']}) could not be trained: {c['reason']}" for c in failed
        ],
        "pareto": pareto_figure(found),
        "rule": _rule(found),
        "table": table_of(found),
        "records": count(found["rule"]["num_records"]),
        "budgets": [
            {
                "parameters": parameters(row["parameters"]),
                "candidate": _named(by_number[row["candidate"]]),
                "loss": loss_text(row["loss"]),
            }
            for row in found["budgets"]
        ],
        "curves": curves_figure(found),
        "importance": importance_figure(found),
        "importance_words": (
            "The share of the variance of the losses that each setting explains by itself (its "
            f"main effect), over all candidates at step {count(step)}, which all of them reached. "
            "What is missing to 100 % is how settings act together; within what was searched only."
        ),
        "ranks": ranks_figure(found),
        "spectrum": spectrum_figure(found),
        "spectrum_lines": _spectrum_lines(found, by_number),
        "suggested": suggested_text(found),
        "commands": shell_line("lorica", "eval", str(folder / "adapter"), "--data", "FILE"),
        "run_yaml": run_yaml,
        "resources": _resources(found),
    }


def table_of(found: Found) -> list[list[str]]:
    """All candidates, the head first, by outcome and loss."""
    rows = [
        [
            "",
            "settings",
            "parameters",
            "loss",
            "above the best",
            "error",
            "steps",
            "what became of it",
        ]
    ]
    order = {"finished": 0, "cut": 1, "training": 2, "waiting": 3, "failed": 4}

    def key(c: Found) -> tuple:
        return order.get(c["outcome"], 5), number(c["loss"]) or 0.0, c["number"]

    for c in sorted(found["candidates"], key=key):
        difference, error = number(c["difference"]), number(c["error"])
        rows.append(
            [
                c["name"],
                c["words"],
                parameters(c["parameters"]),
                loss_text(c["loss"]),
                "–" if difference is None else f"{difference:+.4f}",
                "–" if error is None else f"{error:.4f}",
                count(c["steps"]),
                _became(c, found),
            ]
        )
    return rows


def _became(c: Found, found: Found) -> str:
    if c["number"] == found["chosen"]:
        return "chosen" if c["number"] != found["best"] else "chosen, the best"
    if c["number"] == found["best"]:
        return "the best"
    if c["outcome"] == "finished":
        return "as good, but larger" if c["eligible"] else "worse"
    words = {"cut": "ended early", "training": "in training elsewhere", "failed": "failed"}
    text = words.get(c["outcome"], str(c["outcome"]))
    return f"{text}: {c['reason']}" if c["reason"] else text


def _named(c: Found) -> str:
    return f"{c['name']} ({c['words']})"


def _facts(found: Found) -> list[str]:
    outcomes = [c["outcome"] for c in found["candidates"]]
    facts = [f"{count(len(outcomes))} candidates"]
    facts += [f"{count(outcomes.count('finished'))} trained to the end"]
    about = found.get("about") or {}
    return [*facts, *(str(about[key]) for key in ("model", "data", "sampler") if about.get(key))]


def _rule(found: Found) -> str:
    rule = found["rule"]
    errors = rule["standard_errors"]
    allowed = "one standard error" if errors == 1 else f"{errors:g} standard errors"
    return (
        f"Chosen is the smallest candidate whose loss lies at most {allowed} above the lowest; "
        "both are of the paired difference over the evaluation records (Breiman et al. 1984, "
        "section 3.4.3; Hastie et al. 2009, section 7.10). What other seeds would give is not in "
        "it."
    )


def _spectrum_lines(found: Found, by_number: Mapping[int, Found]) -> list[str]:
    spectrum = found["spectrum"]
    if not spectrum:
        return []
    lines = [
        f"Of {_named(by_number[spectrum['candidate']])}. The effective rank is the exponential of "
        "the entropy of the singular values (Roy and Vetterli 2007). A cut is the nearest update "
        "of its rank, not the best adapter of that rank: training with it can do better."
    ]
    for one in spectrum["cuts"]:
        if one["is_pattern"]:
            lines.append(
                f"With the rank for each layer that keeps 90 % of its update, it has "
                f"{parameters(one['parameters'])} parameters and a loss of "
                f"{loss_text(one['loss'])} ({one['difference']:+.4f}, standard error "
                f"{one['error']:.4f}) without any training."
            )
    return lines


def suggested_text(found: Found) -> str:
    """The suggested ranks as YAML."""
    spectrum = found["spectrum"]
    if not spectrum:
        return ""
    pattern = spectrum["suggested"]["rank_pattern"]
    lines = [f"r: {spectrum['suggested']['r']}", "rank_pattern:" if pattern else "rank_pattern: {}"]
    return "\n".join([*lines, *(f"  {path}: {rank}" for path, rank in pattern.items())])


def _resources(found: Found) -> list[dict[str, str]]:
    known = found.get("resources") or {}
    shown = (
        ("training", "seconds", duration),
        ("in all", "total_seconds", duration),
        ("peak memory", "peak_memory_bytes", size),
        ("at once", "at_once", count),
        ("steps", "steps", count),
        ("of those without pruning", "share_of_steps", lambda value: f"{value:.0%}"),
    )
    return [
        {"name": name, "value": words(known[key])}
        for name, key, words in shown
        if known.get(key) is not None
    ]

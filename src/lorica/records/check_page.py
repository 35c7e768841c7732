"""The page of `lorica check`: one self-contained HTML file in the dress of a run's report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.records.atomic import write_file
from lorica.records.phrases import count
from lorica.records.plots import length_figure
from lorica.records.report import environment
from lorica.records.sections import HERE, marked_parts

_WORDS = {"refuse": "cannot work", "warn": "look at it", "info": "good to know"}
_HEADS = {
    "refuse": ("worse", "Training on these records cannot work as it is"),
    "warn": ("unclear", "Training can begin; some things to look at first"),
    "info": ("better", "Nothing stands against training"),
}


def write_check_page(found: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page.

    Args:
        found: what `lorica check --json` prints.
    """
    findings = found["findings"]
    worst = next((s for s in _HEADS if any(f["severity"] == s for f in findings)), "info")
    kind, headline = _HEADS[worst]
    tokens = found["tokens"]
    content = {
        "css": (HERE / "report.css").read_text("utf-8"),
        "title": Path(str(found["data"])).name,
        "facts": [found["format"], f"{count(found['num_records'])} records", *_facts(found)],
        "kind": kind,
        "headline": headline,
        "statement": found["statement"],
        "findings": [{**f, "words": _WORDS[f["severity"]]} for f in findings],
        "figure": length_figure(tokens["lengths"]["histogram"], "lengths") if tokens else None,
        "percentiles": tokens["lengths"]["percentiles"] if tokens else {},
        "example": marked_parts(found["example"]),
        "labels": _labels(found["labels"]),
    }
    page = environment().get_template("check.html.jinja").render(content)
    return write_file(Path(path), page.encode("utf-8"))


def _facts(found: Mapping[str, Any]) -> list[str]:
    tokens = found["tokens"]
    if not tokens:
        return []
    trained = tokens["trained_share"]
    share = "" if trained is None else f", {trained:.1%} of them trained"
    return [found["task"], f"{count(tokens['num_tokens'])} tokens{share}"]


def _labels(labels: Mapping[str, int]) -> list[dict[str, Any]]:
    total = max(1, sum(labels.values()))
    return [
        {
            "name": name,
            "count": count(n),
            "share": f"{n / total:.1%}",
            "width": f"{100 * n / total:.1f}",
        }
        for name, n in labels.items()
    ][:50]

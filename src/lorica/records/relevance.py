"""relevance.json and its section of the report: how much each layer matters, and what it was given.

{"measure": "fisher", "unit": "entries", "num_records": 128, "notes": [],
 "places": [{"path": "model.layers.0.mlp.up_proj", "layer": 0, "kind": "up_proj",
             "value": 0.31, "chosen": 120, "size": 1908, "heads": [...]}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lorica.records.phrases import count, number
from lorica.records.plots import GRID, INK, SERIES, STYLE, svg

_MOST_NUMBERS = 14
"""Columns up to which the cells have their numbers."""


@dataclass
class Table:
    """Values by row and column, in the order of their coming."""

    cells: dict[tuple[str, str], float] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    def add(self, row: str, column: str, value: float) -> None:
        if row not in self.rows:
            self.rows.append(row)
        if column not in self.columns:
            self.columns.append(column)
        self.cells[row, column] = self.cells.get((row, column), 0.0) + value


def section(relevance: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the report prints of relevance.json; None where it says nothing."""
    places = _places(relevance)
    if not places:
        return None
    unit = str(relevance.get("unit") or "entries")
    measure = str(relevance.get("measure") or "relevance")
    given, sizes = sum(p["chosen"] for p in places), sum(p["size"] for p in places)
    records = number(relevance.get("num_records"))
    from_records = f", from {count(records)} records" if records else ""
    lines = [
        f"{count(given)} of {count(sizes)} {unit} were given by {measure}{from_records}. "
        "Dark is most; each figure has its own scale.",
        *(f"{note[:1].upper()}{note[1:]}." for note in map(str, relevance.get("notes") or [])),
    ]
    best = sorted(places, key=lambda p: -p["value"])[:8]
    rows = [[p["path"], _short(p["value"]), count(p["chosen"]), count(p["size"])] for p in best]
    return {
        "lines": lines,
        "figures": [f for f in (_places_figure(places, measure, unit), _heads_figure(places)) if f],
        "header": ["most relevant places", measure, f"{unit} given", "of"],
        "rows": rows,
    }


def _places(relevance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The places whose numbers are numbers."""
    found = []
    listed = relevance.get("places")
    for place in listed if isinstance(listed, list) else []:
        if not isinstance(place, dict):
            continue
        value, chosen = number(place.get("value")), number(place.get("chosen"))
        size, layer = number(place.get("size")), number(place.get("layer"))
        if value is None or chosen is None or size is None:
            continue
        heads = place.get("heads")
        values = [number(h) for h in heads] if isinstance(heads, list) else []
        found.append(
            {
                "path": str(place.get("path", "")),
                "layer": "-" if layer is None else f"{layer:.0f}",
                "kind": str(place.get("kind", "")),
                "value": value,
                "chosen": chosen,
                "size": size,
                "heads": [h for h in values if h is not None],
            }
        )
    return found


def _places_figure(places: Sequence[Mapping[str, Any]], measure: str, unit: str) -> str:
    """Kinds of modules by layers: what was measured, and what was given."""
    tables = {f"relevance ({measure})": Table(), f"{unit} given": Table()}
    for place in places:
        for table, key in zip(tables.values(), ("value", "chosen"), strict=True):
            table.add(place["kind"], place["layer"], place[key])
    kinds = next(iter(tables.values())).rows
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.75 + 0.27 * len(kinds)), layout="constrained")
        for at, (title, table) in enumerate(tables.items()):
            axes = figure.add_subplot(1, 2, at + 1)
            draw_cells(axes, table, title, "layer", names=at == 0)
        return svg(figure, "relevance", "Relevance by layer and kind of module")


def _heads_figure(places: Sequence[Mapping[str, Any]]) -> str | None:
    """Layers by heads, a figure for each kind of module."""
    tables: dict[str, Table] = {}
    for place in places:
        for i, value in enumerate(place["heads"]):
            tables.setdefault(place["kind"], Table()).add(place["layer"], str(i), value)
    if not tables:
        return None
    shown = list(tables.items())[:4]
    depth = max(len(table.rows) for _, table in shown)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.75 + 0.24 * depth), layout="constrained")
        for at, (kind, table) in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), at + 1)
            draw_cells(axes, table, f"{kind}, layer by head", "head", names=at == 0)
        return svg(figure, "heads", "Relevance by layer and head of attention")


def draw_cells(axes: Axes, table: Table, title: str, along: str, *, names: bool) -> None:
    """A cell per value, as dark as its share of the largest one."""
    largest = max(table.cells.values(), default=0.0) or 1.0
    for (row, column), value in table.cells.items():
        x, y = table.columns.index(column), table.rows.index(row)
        share = max(0.0, value / largest)
        cell = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=0.7 * share)
        axes.add_patch(cell)
        if len(table.columns) <= _MOST_NUMBERS // 2:
            axes.text(x, y, _short(value), ha="center", va="center", fontsize=8, color=INK)
    axes.set_xlim(-0.5, len(table.columns) - 0.5)
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    step = -(-len(table.columns) // _MOST_NUMBERS)
    places = range(0, len(table.columns), step)
    axes.set_xticks(list(places), [table.columns[i] for i in places])
    labels = [row[:24] for row in table.rows] if names else [""] * len(table.rows)
    axes.set_yticks(range(len(table.rows)), labels)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    axes.set_xlabel(along)
    axes.set_title(title)


def _short(value: float) -> str:
    """A number that fits into a cell."""
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"

"""The pictures of docs/methods.md: score over trained parameters, every point with its name.

Colours are stand-ins that become CSS variables, so that one SVG is readable on a light and on a
dark page. No dates and no random ids: the same figures give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

FAMILIES = {
    "products of factors": [
        *("lora", "lora-plus", "lora-fa", "rslora", "dora", "adalora", "pissa", "olora", "loftq"),
        *("eva", "lora-ga", "vera", "loha", "lokr", "hira"),
    ],
    "scales and turns": ["ia3", "road"],
    "bottlenecks": ["houlsby", "pfeiffer", "parallel", "compacter"],
    "virtual tokens, edits": ["prompt-tuning", "p-tuning", "prefix-tuning", "loreft"],
    "the base's own": ["bitfit", "norms", "head", "lisa", "full"],
    "sparse": [],
}
"""Whatever is not named is sparse."""
MARKERS = ("o", "^", "s", "D", "v", "P")
INK, GRID, PAPER = "#010101", "#020202", "#030303"
SERIES = [f"#1010{number:02x}" for number in range(len(FAMILIES))]
LIGHT = (
    "#1f2328",
    "#d1d9e0",
    "#ffffff",
    "#0969da",
    "#9a6700",
    "#1a7f37",
    "#8250df",
    "#57606a",
    "#cf222e",
)
DARK = (
    "#e6edf3",
    "#3d444d",
    "#0d1117",
    "#58a6ff",
    "#d29922",
    "#3fb950",
    "#bc8cff",
    "#9198a1",
    "#ff7b72",
)
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lorica",
    "font.size": 8,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
CLOSE = 0.14
"""Points whose parameters differ by less than this share are put side by side."""


def family(name: str) -> int:
    """The number of a method's family."""
    known = [number for number, names in enumerate(FAMILIES.values()) if name in names]
    return known[0] if known else len(FAMILIES) - 1


def svg(figures: Mapping[str, Any]) -> str:
    """The picture of one task, for light and dark."""
    out = io.StringIO()
    with rc_context(STYLE):
        _figure(figures, [INK, GRID, PAPER, *SERIES]).savefig(
            out, format="svg", metadata={"Date": None}
        )
    text = out.getvalue()
    names = ["ink", "grid", "paper", *(f"series-{number}" for number in range(len(SERIES)))]
    for colour, name in zip([INK, GRID, PAPER, *SERIES], names, strict=True):
        text = text.replace(colour, f"var(--{name})")

    def rules(colours: Sequence[str]) -> str:
        return "".join(f"--{n}:{c};" for n, c in zip(names, colours, strict=True))

    style = f"<style>:root{{{rules(LIGHT)}}}@media (prefers-color-scheme:dark){{:root{{"
    style += f"{rules(DARK)}}}}}</style>"
    head, mark, rest = text.partition("<defs>")
    return f"{head}{style}\n {mark}{rest}"


def png(figures: Mapping[str, Any], *, dark: bool) -> bytes:
    """The same picture as pixels, on a page of its own, to be looked at."""
    out = io.BytesIO()
    colours = DARK if dark else LIGHT
    figure = _figure(figures, colours)
    figure.savefig(out, format="png", dpi=130, facecolor=colours[2])
    return out.getvalue()


def _figure(figures: Mapping[str, Any], colours: Sequence[str]) -> Figure:
    """Ink, grid, paper and one colour for each family."""
    ink, grid, paper, *series = colours
    own = {key: {INK: ink, GRID: grid}.get(value, value) for key, value in STYLE.items()}
    with rc_context(own):
        figure = Figure(figsize=(9.2, 6.4), dpi=72)  # as SVG has it
        canvas = FigureCanvasAgg(figure)  # which knows how wide a text is
        axes = figure.add_subplot()
        points = _points(figures)
        _draw(axes, points, series)
        lower = figures["metric"] == "loss"
        axes.set_ylabel(
            "loss, nats per token (lower is better)" if lower else "accuracy on test records"
        )
        if lower:
            axes.invert_yaxis()
        axes.set_xlabel("trained parameters; those that are equal stand side by side")
        axes.set_title(figures["title"], fontsize=9, loc="left", color=ink, pad=22)
        figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.075)
        _legend(figure, series, ink)
        canvas.draw()
        _label(axes, points, canvas.get_renderer(), (ink, paper))
    return figure


def _points(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, place and interval of every method; equal x parted."""
    found = []
    for name, own in figures["methods"].items():
        side = own["sides"]["lorica"]
        found.append(
            {
                "name": name,
                "x": float(side["num_trainable"]),
                "y": side["score"],
                "interval": side["interval"],
                "family": family(name),
            }
        )
    found.sort(key=lambda point: (point["x"], point["y"]))
    groups: list[list[dict[str, Any]]] = []
    for point in found:
        if groups and point["x"] <= groups[-1][0]["x"] * (1 + CLOSE):
            groups[-1].append(point)
        else:
            groups.append([point])
    for group in groups:
        middle = (len(group) - 1) / 2
        for place, point in enumerate(group):
            point["shown"] = group[0]["x"] * 1.09 ** (place - middle)
    return found


def _draw(axes: Axes, points: list[dict[str, Any]], series: Sequence[str]) -> None:
    axes.set_xscale("log")
    for point in points:
        colour = series[point["family"]]
        x = point["shown"]
        axes.plot([x, x], point["interval"], color=colour, lw=0.9, alpha=0.5, zorder=2)
        axes.plot([x], [point["y"]], MARKERS[point["family"]], color=colour, ms=4.5, zorder=3)
    widest = max(p["shown"] for p in points) / min(p["shown"] for p in points)
    axes.set_xlim(
        min(p["shown"] for p in points) / widest**0.06,
        max(p["shown"] for p in points) * widest**0.06,
    )


def _legend(figure: Figure, series: Sequence[str], ink: str) -> None:
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", ms=4.5, label=name)
        for name, marker, colour in zip(FAMILIES, MARKERS, series, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=len(handles),
        labelcolor=ink,
        fontsize=7.5,
        handletextpad=0.1,
        columnspacing=1.0,
        bbox_to_anchor=(0.99, 0.945),
    )


# --- names that lie on nothing --------------------------------------------------------------------

_SIZE = 6.8  # points


def _label(
    axes: Axes, points: list[dict[str, Any]], renderer: Any, colours: tuple[str, str]
) -> list[Bbox]:
    """Write each name at the nearest free place around its point, with a line to it. Returns where
    the names are.
    """
    figure = axes.figure
    shares = figure.transFigure.inverted()  # of the figure, whatever its resolution
    ink, paper = colours
    how: dict[str, Any] = {"transform": figure.transFigure, "color": ink}
    style: dict[str, Any] = {"fontsize": _SIZE, "va": "bottom", "zorder": 4}
    behind = {"facecolor": paper, "edgecolor": "none", "alpha": 0.8, "pad": 0.4}
    inside = axes.get_window_extent(renderer)
    places = [axes.transData.transform((p["shown"], p["y"])) for p in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.text(0, 0, point["name"], bbox=behind, **style, **how)
        size = text.get_window_extent(renderer)
        box = _free(x, y, size.width, size.height, taken, inside)
        text.set_position(shares.transform((box.x0, box.y0)))
        taken.append(box)
        end = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        (x0, y0), (x1, y1) = shares.transform([(x, y), end])
        axes.add_line(Line2D([x0, x1], [y0, y1], lw=0.4, alpha=0.5, zorder=1, **how))
    return taken[len(points) :]


def _free(x: float, y: float, width: float, height: float, taken: list[Bbox], inside: Bbox) -> Bbox:
    """The nearest box of this size around a place that lies inside and on nothing."""
    best: tuple[float, Bbox] | None = None
    for step in range(1, 46):
        away = 3.0 + 4.0 * step
        for dx, dy in _DIRECTIONS:
            centre_x = x + dx * (away + width / 2)
            centre_y = y + dy * (away + height / 2)
            box = Bbox.from_bounds(centre_x - width / 2, centre_y - height / 2, width, height)
            if box.x0 < inside.x0 or box.x1 > inside.x1:
                continue
            if box.y0 < inside.y0 or box.y1 > inside.y1:
                continue
            wide = Bbox.from_extents(box.x0 - 1.5, box.y0 - 1, box.x1 + 1.5, box.y1 + 1)
            if wide.count_overlaps(taken) == 0:
                return box
            best = best or (away, box)
    assert best is not None, "the picture has no room for a name"
    return best[1]


_DIRECTIONS = [(1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7)]
_DIRECTIONS += [(0, 1), (0, -1), (0.4, 1), (0.4, -1), (-0.4, 1), (-0.4, -1)]

"""The figures of the report as inline SVG that takes its colours and fonts from the page.

matplotlib writes fixed colours, so each is drawn in a colour that stands for a CSS variable and
replaced afterwards: one figure serves light and dark. Ids get a prefix per figure, because one page
holds several. No dates, no random ids: the same run gives the same bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lorica.records.phrases import metric_name, number, rate, score_cells
from lorica.records.smooth import smoothed, thinned

POINTS = 400  # of a curve; more cannot be seen
NUM_COLOURS = 8

INK, MUTED, GRID, _PAPER, _BASE = "#010101", "#020202", "#030303", "#040404", "#050505"
_GOOD = "#060606"
SERIES = [f"#1010{index:02x}" for index in range(NUM_COLOURS)]
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    _PAPER: "paper",
    _BASE: "base",
    _GOOD: "good",
} | {colour: f"series-{index}" for index, colour in enumerate(SERIES)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lorica",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}


@dataclass
class Curves:
    """One adapter's columns of metrics.jsonl: (steps, values) per name, rows without a finite value
    left out.
    """

    adapter: str
    columns: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def add(self, name: str, step: float, value: object) -> None:
        amount = number(value)
        if amount is not None:
            steps, values = self.columns.setdefault(name, ([], []))
            steps.append(step)
            values.append(amount)

    def get(self, name: str) -> tuple[list[float], list[float]]:
        return self.columns.get(name, ([], []))


def curves_of(rows: Sequence[Mapping]) -> list[Curves]:
    """The rows sorted into one `Curves` per adapter, in order of first appearance."""
    found: dict[str, Curves] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is None:
            continue
        name = str(row.get("adapter") or "")
        curves = found.setdefault(name, Curves(name))
        for key, value in row.items():
            if key not in ("step", "adapter"):
                curves.add(key, step, value)
    return list(found.values())


def loss_figure(curves: Sequence[Curves], unit: str = "nats per token") -> str | None:
    """Loss (each row faint, smoothed strong) and eval loss with its lowest point; None where there
    is nothing.
    """
    if not any(c.get("loss")[0] or c.get("eval_loss")[0] for c in curves):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for index, one in enumerate(curves):
            _draw_loss(axes, one, SERIES[index % NUM_COLOURS], alone=len(curves) == 1)
        _scale_loss(axes, curves, unit)
        axes.set_xlabel("step")
        if len(curves) == 1:
            axes.legend(loc="upper right", ncols=3, fontsize=9, handlelength=1.6)
        return svg(figure, "loss", "Loss and eval loss over the steps")


def rate_figure(curves: Sequence[Curves]) -> str | None:
    """Learning rate and gradient norm side by side; None where there is neither."""
    names = [name for name in ("learning_rate", "grad_norm") if any(c.get(name)[0] for c in curves)]
    if not names:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.1), layout="constrained")
        for place, name in enumerate(names):
            axes = figure.add_subplot(1, 2, place + 1)
            for index, one in enumerate(curves):
                steps, values = thinned(*one.get(name), POINTS)
                axes.plot(steps, values, color=SERIES[index % NUM_COLOURS], linewidth=1.2)
            axes.set_title("learning rate" if name == "learning_rate" else "gradient norm")
            axes.set_ylim(bottom=0)
            _few_ticks(axes)
            if name == "learning_rate":
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
        return svg(figure, "rate", "Learning rate and gradient norm over the steps")


def score_figure(scores: Mapping[str, Mapping], prefix: str) -> str | None:
    """Base and tuned as bars, each score on its own scale. The line at the tuned bar is the
    interval of the difference, drawn from the base's value."""
    shown = {
        name: score for name, score in scores.items() if number(score.get("tuned")) is not None
    }
    if not shown:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.35 + 0.62 * len(shown)), layout="constrained")
        for place, (name, score) in enumerate(shown.items()):
            axes = figure.add_subplot(len(shown), 1, place + 1)
            _draw_score(axes, name, score)
        return svg(figure, prefix, "Scores of base and tuned")


def length_figure(histogram: Mapping, prefix: str) -> str | None:
    """Records by length in tokens: {"edges": n + 1 numbers, "counts": n numbers}; None where these
    do not fit.
    """
    edges, counts = histogram.get("edges", []), histogram.get("counts", [])
    if (
        len(edges) != len(counts) + 1
        or not counts
        or any(number(v) is None for v in [*edges, *counts])
    ):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.7), layout="constrained")
        axes = figure.add_subplot()
        widths = [right - left for left, right in pairwise(edges)]
        axes.bar(edges[:-1], counts, width=widths, align="edge", color=SERIES[0], edgecolor=_PAPER)
        axes.set_xlabel("tokens in a record")
        axes.grid(visible=False, axis="x")
        _few_ticks(axes)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return svg(figure, prefix, "Histogram of record lengths")


def _draw_loss(axes: Axes, curves: Curves, colour: str, *, alone: bool) -> None:
    steps, losses = curves.get("loss")
    if steps:
        markers = {"marker": "o", "markersize": 3} if len(steps) < 5 else {}
        if alone and len(steps) >= 5:
            axes.plot(*thinned(steps, losses, POINTS), color=colour, alpha=0.3, linewidth=0.8)
        drawn = thinned(steps, smoothed(losses), POINTS)
        axes.plot(*drawn, color=colour, linewidth=1.8, label="loss (smoothed)", **markers)
    eval_steps, eval_losses = curves.get("eval_loss")
    if not eval_steps:
        return
    eval_colour = SERIES[1] if alone else colour
    axes.plot(
        eval_steps,
        eval_losses,
        color=eval_colour,
        linewidth=1.4,
        linestyle="-" if alone else (0, (4, 2)),
        marker="o" if len(eval_steps) <= 40 else "",
        markersize=3.5,
        label="eval loss",
    )
    best = min(range(len(eval_losses)), key=eval_losses.__getitem__)
    label = f"best {eval_losses[best]:.3f} at step {eval_steps[best]:,.0f}"
    axes.plot(
        eval_steps[best],
        eval_losses[best],
        color=eval_colour,
        marker="*",
        markersize=11,
        linestyle="",
        label=label,
    )


def _scale_loss(axes: Axes, curves: Sequence[Curves], unit: str) -> None:
    """A logarithmic axis where the loss spans much; a single spike must not flatten the curve."""
    values = sorted(v for c in curves for name in ("loss", "eval_loss") for v in c.get(name)[1])
    low, middle, high = values[0], values[len(values) // 2], values[-1]
    if low > 0 and high > 12 * middle:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{unit}, log scale")
    else:
        axes.set_ylabel(unit)
        axes.margins(y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    _step_ticks(axes, 8)


def _draw_score(axes: Axes, name: str, score: Mapping) -> None:
    base, tuned = number(score.get("base")), number(score.get("tuned")) or 0.0
    low, high = number(score.get("low")), number(score.get("high"))
    cells = score_cells(score)
    reach = max(abs(base or 0.0), abs(tuned), abs((base or 0.0) + (high or 0.0))) or 1.0
    if base is not None:
        axes.barh(1, base, height=0.72, color=_BASE)
    axes.barh(0, tuned, height=0.72, color=SERIES[0])
    ends = [base or 0.0, tuned]
    if base is not None and low is not None and high is not None:
        axes.plot(
            [base + low, base + high], [0, 0], color=INK, linewidth=1.4, marker="|", markersize=6
        )
        ends[1] = max(tuned, base + high)
    for place, end, text in (
        (1, ends[0], f"base {cells['base']}"),
        (0, ends[1], f"tuned {cells['tuned']}"),
    ):
        if place == 0 or base is not None:
            colour = INK if place == 0 else MUTED
            axes.text(
                max(end, 0) + 0.012 * reach, place, text, va="center", fontsize=8.5, color=colour
            )
    axes.set_xlim(min(0.0, base or 0.0, tuned), 1.16 * reach)
    axes.set_ylim(-0.55, 1.55)
    axes.set_yticks([0.5], [_ascii(metric_name(name))], fontsize=9.5, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _ascii(text: str) -> str:
    """The font of the layout has not every sign; the table beside the figure has the name as it
    is.
    """
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:24]


def _few_ticks(axes: Axes) -> None:
    _step_ticks(axes, 5)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _step_ticks(axes: Axes, most: int) -> None:
    axes.margins(x=0.015)
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def svg(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an <svg> element that needs nothing from outside."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL
    )  # that style would hold for the page
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    label = f'<svg class="figure" role="img" aria-label="{title}"'
    return text.replace("<svg", label, 1).strip()

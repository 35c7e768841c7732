"""The page of `lorica extract`: the singular values of what a full fine-tune changed, by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorica.records.atomic import write_file
from lorica.records.plots import NUM_COLOURS, SERIES, STYLE, svg
from lorica.records.report import environment
from lorica.records.sections import HERE


def write_spectra_page(
    title: str, facts: Sequence[str], places: Sequence[Mapping[str, Any]], path: str | Path
) -> Path:
    """Write the page.

    Args:
        title: names the adapter.
        facts: lines below it.
        places: path, rank, error, size, relative and spectrum of every layer.
    """
    content = {
        "css": (HERE / "report.css").read_text("utf-8"),
        "title": title,
        "facts": list(facts),
        "spectra": spectra_figure(places),
        "errors": error_figure(places),
        "places": [
            {
                "path": place["path"],
                "rank": place["rank"],
                "error": f"{place['error']:.1%}",
                "relative": f"{place['relative']:.2%}",
            }
            for place in places
        ],
    }
    page = environment().get_template("spectra.html.jinja").render(content)
    return write_file(Path(path), page.encode("utf-8"))


def spectra_figure(places: Sequence[Mapping[str, Any]]) -> str:
    """Every layer's singular values over its norm, one colour for layers of one name."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, colour, place in _coloured(places):
            values = [value / place["size"] for value in place["spectrum"]]
            axes.plot(range(1, len(values) + 1), values, color=colour, lw=0.9, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("number")
        axes.set_ylabel("singular value")
        _legend(axes)
        return svg(figure, "spectra", "Singular values of the change of every layer")


def error_figure(places: Sequence[Mapping[str, Any]]) -> str:
    """What every rank would leave, and the ranks that were chosen."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, colour, place in _coloured(places):
            left = [1.0]
            for value in place["spectrum"]:
                left.append(max(0.0, left[-1] - (value / place["size"]) ** 2))
            axes.plot([share**0.5 for share in left], color=colour, lw=0.9, label=name)
            axes.plot([place["rank"]], [place["error"]], ".", color=colour, ms=5)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("rank")
        axes.set_ylabel("share not held")
        _legend(axes)
        return svg(figure, "errors", "Share of the change that a rank does not hold")


def _coloured(places: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Each place with a label (the first of its name alone) and the colour of its name."""
    names: dict[str, str] = {}
    found = []
    for place in places:
        name = str(place["path"]).rpartition(".")[2]
        first = name not in names
        colour = names.setdefault(name, SERIES[len(names) % NUM_COLOURS])
        found.append((name if first else "_", colour, place))
    return found


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="upper right", ncols=4, fontsize=8, handlelength=1.4)

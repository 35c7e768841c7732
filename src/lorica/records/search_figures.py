"""The figures of a search's page: score over size, curves, importance, spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lorica.records.phrases import parameters
from lorica.records.plots import GRID, INK, MUTED, NUM_COLOURS, SERIES, STYLE, svg
from lorica.records.relevance import Table, draw_cells

Found = Mapping[str, Any]
_FULL, _CUT, _CHOSEN = SERIES[0], MUTED, SERIES[1]


def pareto_figure(found: Found) -> str | None:
    """Evaluation loss over trained parameters: every candidate, who was cut, the frontier, and the
    line below which a candidate counts as good as the best.
    """
    shown = [c for c in found["candidates"] if c["loss"] is not None and c["parameters"]]
    if not shown:
        return None
    by_number = {c["number"]: c for c in shown}
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for outcome, colour, face, label in (
            ("cut", _CUT, "none", "ended early"),
            ("finished", _FULL, _FULL, "trained to the end"),
        ):
            own = [c for c in shown if c["outcome"] == outcome]
            x, y = [c["parameters"] for c in own], [c["loss"] for c in own]
            axes.scatter(x, y, s=26, edgecolors=colour, facecolors=face, label=label, zorder=3)
        steps = [by_number[n] for n in found["frontier"]]
        x, y = [c["parameters"] for c in steps], [c["loss"] for c in steps]
        axes.step(x, y, where="post", color=_FULL, linewidth=1.0, alpha=0.6)
        _mark_chosen(axes, by_number[found["chosen"]], by_number[found["best"]])
        _name_points(axes, shown)
        _size_axis(axes, [c["parameters"] for c in shown])
        _loss_axis(axes, [c["loss"] for c in shown])
        axes.set_ylabel("evaluation loss (nats per token)")
        axes.legend(loc="best", fontsize=8.5)
        return svg(figure, "pareto", "Evaluation loss over trained parameters")


def _mark_chosen(axes: Axes, chosen: Found, best: Found) -> None:
    how: dict[str, Any] = {"s": 110, "facecolors": "none", "linewidths": 1.6, "zorder": 4}
    axes.scatter(
        [chosen["parameters"]], [chosen["loss"]], edgecolors=_CHOSEN, label="chosen", **how
    )
    axes.axhline(best["loss"], color=GRID, linewidth=0.9, zorder=1)
    if chosen is not best and chosen["error"] is not None:
        axes.errorbar(
            [chosen["parameters"]],
            [chosen["loss"]],
            yerr=[[chosen["error"]], [0.0]],
            color=_CHOSEN,
            linewidth=1.2,
            capsize=3,
            zorder=4,
        )


def _name_points(axes: Axes, shown: Sequence[Found]) -> None:
    """The rank beside each point; of several at one place, of one."""
    spread = max(c["loss"] for c in shown) - min(c["loss"] for c in shown) or 1.0
    written: list[tuple[int, float]] = []
    for c in sorted(shown, key=lambda c: c["loss"]):
        near = any(x == c["parameters"] and abs(y - c["loss"]) < 0.06 * spread for x, y in written)
        if c["rank"] is None or near:
            continue
        written.append((c["parameters"], c["loss"]))
        axes.annotate(
            f"r {c['rank']}",
            (c["parameters"], c["loss"]),
            xytext=(6, 5),  # above the frontier, which leaves a point to the right
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )


def curves_figure(found: Found) -> str | None:
    """Evaluation loss over the steps: the chosen one and the finished ones strong, the others
    faint.
    """
    shown = [c for c in found["candidates"] if c["curve"]]
    if not shown:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        finished = [c for c in shown if c["outcome"] == "finished"]
        for c in shown:
            steps, losses = zip(*c["curve"], strict=True)
            if c["number"] == found["chosen"]:
                how: dict[str, Any] = {"color": _CHOSEN, "linewidth": 2.2, "zorder": 4}
                how["label"] = f"chosen: {_plain(c['words'])}"
            elif c["outcome"] == "finished":
                place = finished.index(c)
                colours = [colour for colour in SERIES if colour != _CHOSEN]
                how = {"color": colours[place % (NUM_COLOURS - 1)], "linewidth": 1.3}
                how["label"] = _plain(c["words"]) if len(finished) <= 8 else None
            else:
                how = {"color": _CUT, "linewidth": 0.8, "alpha": 0.7}
            axes.plot(steps, losses, marker="o", markersize=2.5, **how)
            if c["outcome"] != "finished":
                axes.plot(steps[-1:], losses[-1:], marker="x", markersize=5, color=_CUT)
        _loss_axis(axes, [loss for c in shown for _, loss in c["curve"]])
        axes.set_xlabel("step; a cross: ended early")
        axes.set_ylabel("evaluation loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(loc="outside right upper", fontsize=8)
        return svg(figure, "curves", "Evaluation loss of all candidates over the steps")


def importance_figure(found: Found) -> str | None:
    """How much of the variance of the losses each setting explains."""
    shares = found["importance"]["settings"]
    if not shares:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.45 + 0.3 * len(shares)), layout="constrained")
        axes = figure.add_subplot()
        names = list(shares)[::-1]
        axes.barh(range(len(names)), [shares[n] for n in names], height=0.62, color=_FULL)
        for place, name in enumerate(names):
            axes.text(shares[name] + 0.01, place, f"{shares[name]:.0%}", va="center", fontsize=8.5)
        axes.set_yticks(range(len(names)), [_plain(name) for name in names], color=INK)
        axes.set_xlim(0, 1.1)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        return svg(figure, "importance", "Share of the variance that each setting explains")


def ranks_figure(found: Found) -> str | None:
    """Loss over rank: what was trained with it, and the largest one cut to it."""
    spectrum = found["spectrum"]
    if not spectrum or not spectrum["cuts"]:
        return None
    trained: dict[int, float] = {}
    for c in found["candidates"]:
        if c["outcome"] == "finished" and c["rank"]:
            trained[c["rank"]] = min(c["loss"], trained.get(c["rank"], c["loss"]))
    cuts = {c["rank"]: c["loss"] for c in spectrum["cuts"] if not c["is_pattern"]}
    whole = next(c for c in found["candidates"] if c["number"] == spectrum["candidate"])
    cuts[whole["rank"]] = whole["loss"]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for values, colour, marker, label in (
            (cuts, _FULL, "o", f"rank {whole['rank']} cut to this rank, not trained again"),
            (trained, _CHOSEN, "s", "trained with this rank (the best of each)"),
        ):
            x = sorted(values)
            y = [values[rank] for rank in x]
            axes.plot(x, y, color=colour, marker=marker, markersize=4.5, label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({*cuts, *trained})
        axes.set_xticks(ticks, [str(rank) for rank in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank")
        axes.set_ylabel("evaluation loss (nats per token)")
        axes.legend(loc="best", fontsize=8.5)
        return svg(figure, "ranks", "Evaluation loss over rank, trained and cut")


def spectrum_figure(found: Found) -> str | None:
    """Kinds of modules by layers: the effective rank of the update, and the rank that keeps 90 % of
    it.
    """
    spectrum = found["spectrum"]
    if not spectrum or not spectrum["layers"]:
        return None
    tables = {
        "effective rank of the update": ("effective", Table()),
        "rank that keeps 90 % of it": ("energy_90", Table()),
    }
    for layer in spectrum["layers"]:
        for key, table in tables.values():
            table.add(layer["kind"], layer["layer"], layer[key])
    kinds = len(next(iter(tables.values()))[1].rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.75 + 0.27 * kinds), layout="constrained")
        for at, (title, (_, table)) in enumerate(tables.items()):
            axes = figure.add_subplot(1, 2, at + 1)
            draw_cells(axes, table, title, "layer", names=at == 0)
        return svg(figure, "spectrum", "Effective rank by layer and kind of module")


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("parameters that train")
    ticks = sorted(set(sizes))
    if len(ticks) <= 8:
        axes.set_xticks(ticks, [parameters(size) for size in ticks])
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: parameters(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)


def _loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """A candidate that went astray must not flatten the others."""
    ordered = sorted(losses)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    room = max(2.5 * (middle - low), 0.02 * abs(low), 1e-6)
    if high > middle + 2 * room:
        axes.set_ylim(low - 0.12 * room, middle + 2 * room)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _plain(text: str) -> str:
    """What the font of the layout has."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:60]

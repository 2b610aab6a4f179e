"""The figures of the report: matplotlib draws them to SVG, whose colours the page's style sheet then decides."""

from __future__ import annotations

import io
import math
import re
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from h2rec.training.report.run import ReportedRun

# Placeholder colours that nothing else draws, each replaced by a variable of the style sheet, which has a light
# and a dark value for it.
_INK, _MUTED, _GRID = "#010101", "#010102", "#010103"
_SERIES = ("#020201", "#020202", "#020203", "#020204", "#020205", "#020206", "#020207")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {
    colour: f"--series-{i}" for i, colour in enumerate(_SERIES)
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ((), (5, 1.6), (1.4, 1.4), (5, 1.4, 1.4, 1.4), (8, 2), (3, 1), (1, 3))
_KNOWN = ("hash", "semantic", "sum", "h2rec")


def band_chart(run: ReportedRun) -> str:
    """NDCG@10 of the full ranking by training popularity of the held-out item, a bar per model."""
    bands = [band for band in run.bands() if run.count(band)]
    figure, axes = _figure(9.2, 3.4)
    width = 0.8 / len(run.models)
    for i, model in enumerate(run.models):
        heights = [run.value(model, "full", band, "NDCG@10") for band in bands]
        places = [x + (i - (len(run.models) - 1) / 2) * width for x in range(len(bands))]
        axes.bar(places, heights, width * 0.9, color=_colour(run, model), label=_text(run.label(model)))
    axes.set_xticks(range(len(bands)), [f"{_band_name(band)}\n{_users(run.count(band))}" for band in bands])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("NDCG@10")
    axes.grid(axis="x", visible=False)
    _legend(axes, columns=4)
    return _svg(figure, "bands", "NDCG@10 by popularity band, one bar per model")


def head_tail_chart(run: ReportedRun) -> str:
    """A point per model: NDCG@10 on head items against tail items."""
    figure, axes = _figure(4.8, 3.7)
    for model in run.models:
        head, tail = (run.value(model, "full", group, "NDCG@10") for group in ("head", "tail"))
        if math.isnan(head) or math.isnan(tail):
            continue
        if model == "hash":
            axes.axvline(head, color=_MUTED, linewidth=1, dashes=(4, 3), zorder=2)
            axes.axhline(tail, color=_MUTED, linewidth=1, dashes=(4, 3), zorder=2)
        axes.plot(
            head,
            tail,
            _MARKERS[_place(run, model)],
            color=_colour(run, model),
            markersize=9 if model == "h2rec" else 7.5,
            label=_text(run.label(model)),
            zorder=3,
        )
    axes.margins(0.18)
    axes.locator_params(nbins=5)
    axes.set_xlabel("head items: NDCG@10")
    axes.set_ylabel("tail items: NDCG@10")
    _legend(axes, columns=2)
    return _svg(figure, "head-tail", "NDCG@10 on head items against tail items, one point per model")


def curve_chart(run: ReportedRun, column: str, label: str) -> str:
    """A column of the models' metrics.csv by epoch; the epoch whose weights were kept is marked."""
    figure, axes = _figure(4.8, 3.7)
    for model in run.models:
        epochs, values = run.curves[model]["epoch"], run.curves[model][column]
        place = _place(run, model)
        colour = _colour(run, model)
        axes.plot(epochs, values, color=colour, dashes=_DASHES[place], label=_text(run.label(model)))
        best = run.metrics["models"][model]["best_epoch"]
        axes.plot(best, values[epochs.index(best)], _MARKERS[place], color=colour, markersize=6)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes, columns=2)
    return _svg(figure, f"curve-{column}", f"{label} by epoch, one line per model")


def codebook_chart(run: ReportedRun) -> str:
    """For every level of the semantic IDs: the share of codes in use, and perplexity over codebook size."""
    stats = run.metrics["sid_stats"]
    used = [100 * share for share in stats["utilisation"]]
    even = [100 * p / size for p, size in zip(stats["perplexity"], stats["codebook_sizes"], strict=True)]
    figure, axes = _figure(4.8, 3.7)
    levels = range(len(used))
    axes.bar([x - 0.2 for x in levels], used, 0.36, color=_SERIES[5], label="codes in use")
    axes.bar([x + 0.2 for x in levels], even, 0.36, color=_SERIES[4], label="perplexity / size")
    names = [f"level {i + 1}\n{size:,} codes" for i, size in enumerate(stats["codebook_sizes"])]
    axes.set_xticks(levels, names)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 105)
    axes.set_ylabel("percent of the codebook")
    axes.grid(axis="x", visible=False)
    _legend(axes, columns=2)
    return _svg(figure, "codebooks", "Use of every level's codebook, in percent")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=9.5, width=0.8)
    axes.tick_params(axis="y", length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=_MUTED, fontsize=9.5)
    return figure, axes


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=_INK,
        handlelength=1.5,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def _place(run: ReportedRun, model: str) -> int:
    """The models of the paper's comparison keep their colour whichever of them a run holds."""
    others = cycle(range(len(_KNOWN), len(_SERIES)))
    places = {name: _KNOWN.index(name) if name in _KNOWN else next(others) for name in run.models}
    return places[model]


def _colour(run: ReportedRun, model: str) -> str:
    return _SERIES[_place(run, model)]


def series_variable(run: ReportedRun, model: str) -> str:
    """The style sheet's variable with the colour of a model, for legends outside the figures."""
    return _VARIABLES[_colour(run, model)]


def _text(label: str) -> str:
    return label.replace("$", r"\$")  # a dollar sign would start a formula


def _band_name(band: str) -> str:
    return "0 (cold)" if band == "0" else band.replace("-", "\N{EN DASH}")


def _users(count: int) -> str:
    return f"{count:,} user" + ("" if count == 1 else "s")


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element for a page: no header, metadata or address, ids of its own, CSS colours."""
    import matplotlib

    drawn = io.StringIO()
    # Text stays text, so that it is readable, searchable and takes the page's font; ids are unique in the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="((?:figure|axes|patch|text|legend|line2d|matplotlib|xtick|ytick)[^"]*)"', "", svg)
    svg = re.sub(r"<svg([^>]*?)\swidth=\"[^\"]*\"", r"<svg\1", svg, count=1)
    svg = re.sub(r"<svg([^>]*?)\sheight=\"[^\"]*\"", r"<svg\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()

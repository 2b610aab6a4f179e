"""The picture of a run: a bar per column that is not the baseline. Needs matplotlib."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ._harness import Comparison

BAR_INCHES = 0.26


def draw_ratios(comparisons: Sequence[Comparison], caption: str) -> Figure:
    """Bars start at 1, the baseline: to the right is faster, to the left slower; the line is the spread."""
    groups = [(c, [column.name for column in c.columns if column.name != c.baseline]) for c in comparisons]
    groups = [(comparison, names) for comparison, names in groups if names]
    operators = list(dict.fromkeys(comparison.operator for comparison, _ in groups))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(n for _, names in groups for n in names))}

    rows = [sum(len(names) + 1 for c, names in groups if c.operator == operator) for operator in operators]
    height = BAR_INCHES * sum(rows) + 0.9 * len(operators) + 0.8
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(len(operators), 1, squeeze=False, height_ratios=rows, sharex=True)[:, 0]
    for axis, operator in zip(axes, operators, strict=True):
        _draw_operator(axis, [(c, names) for c, names in groups if c.operator == operator], colours)
        axis.set_title(operator, loc="left", fontweight="bold")
    axes[-1].set_xlabel(
        "ratio to the baseline's median time (above 1 is faster); line: range over the rounds"
    )
    figure.suptitle(caption, fontsize=8)
    return figure


def _draw_operator(axis, groups, colours) -> None:
    labels, places, place = [], [], 0.0
    for comparison, names in groups:
        for name in names:
            ratio = comparison.ratio(name)
            axis.barh(place, ratio.of_medians - 1, left=1, height=0.8, color=colours[name])
            axis.plot([ratio.lowest, ratio.highest], [place, place], color="black", linewidth=1)
            right = max(ratio.highest, ratio.of_medians, 1)
            axis.annotate(
                f"{ratio.of_medians:.2f}",
                (right, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            labels.append(f"{comparison.case}  {comparison.shape}   {name} / {comparison.baseline}")
            places.append(place)
            place += 1
        place += 0.6
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axvline(1, color="black", linewidth=1)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_axisbelow(True)
    axis.margins(x=0.12)

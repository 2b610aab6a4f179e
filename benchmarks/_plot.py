"""The picture of a run: a bar per column that is not the baseline."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ._harness import Comparison

ROW_INCHES = 0.24
TITLE_INCHES = 0.5
ALL_TICKS_RATIO = 60  # an axis that spans more than this has no room for ticks at 2 and 5


def draw_ratios(comparisons: Sequence[Comparison], caption: str) -> Figure:
    """Bars start at 1, the baseline: to the right is faster, to the left slower; the line is the spread."""
    rivals = [c for c in comparisons if len(c.columns) > 1]
    operators = sorted({comparison.operator for comparison in rivals})
    by_operator = [[c for c in rivals if c.operator == operator] for operator in operators]
    names = dict.fromkeys(column.name for c in rivals for column in c.columns if column.name != c.baseline)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}

    # A comparison takes a row for its heading in place of its baseline.
    rows = [sum(len(comparison.columns) for comparison in group) for group in by_operator]
    height = ROW_INCHES * sum(rows) + TITLE_INCHES * (len(operators) + 2)
    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(caption, fontsize=9)
    figure.supxlabel("times as fast as the baseline (medians); line: range over the rounds", fontsize=9)
    if not rivals:
        return figure
    all_axes = figure.subplots(len(operators), 1, squeeze=False, height_ratios=rows, sharex=True)[:, 0]
    for axes, operator, group in zip(all_axes, operators, by_operator, strict=True):
        axes.set_title(operator, loc="left", fontweight="bold")
        _draw_operator(axes, group, colours)
    _set_ratio_axis(all_axes)
    return figure


def _draw_operator(axes: Axes, comparisons: Sequence[Comparison], colours: dict[str, str]) -> None:
    labels: list[str] = []
    headings = []
    for comparison in comparisons:
        headings.append(len(labels))
        labels.append(f"{comparison.case}  {comparison.shape}")
        for column in comparison.columns:
            if column.name == comparison.baseline:
                continue
            ratio, place = comparison.ratio(column.name), len(labels)
            axes.barh(place, ratio.of_medians - 1, left=1, height=0.8, color=colours[column.name])
            axes.plot([ratio.lowest, ratio.highest], [place, place], color="black", linewidth=1)
            axes.annotate(
                f"{ratio.of_medians:.2f}",
                (max(ratio.highest, 1), place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            labels.append(f"{column.name} / {comparison.baseline}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for heading in headings:
        axes.get_yticklabels()[heading].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _set_ratio_axis(all_axes: Sequence[Axes]) -> None:
    for axes in all_axes:
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.axvline(1, color="black", linewidth=1)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_axisbelow(True)
    low, high = all_axes[0].get_xlim()
    subs = (1, 2, 5) if high / low < ALL_TICKS_RATIO else (1,)
    for axes in all_axes:
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="x", labelbottom=True, labelsize=8)

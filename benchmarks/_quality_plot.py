"""The pictures of `benchmarks.quality`."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from h2rec.data import POPULARITY_BANDS

from ._quality_report import CHAMPION, balance_curve, by_variant, mean_metric, of_common_seeds

Cells = Sequence[dict[str, Any]]

_COMPARED = (CHAMPION, "sum", "hash", "semantic", "llminit", "mean", "concat", "paper", "sum-128")
_COLORS = {variant: f"C{i}" for i, variant in enumerate(_COMPARED)}  # the same in all data sets


def draw(cells: Cells) -> dict[str, Figure]:
    """By name: ``bands``, ``seesaw`` and, where there are ablations, ``ablation``; a column of axes per data set."""
    figures = {"bands": (_draw_bands, 7.0), "seesaw": (_draw_seesaw, 4.5), "ablation": (_draw_ablation, 5.5)}
    drawn = {}
    for name, (draw_axes, width) in figures.items():
        chosen = [
            cell
            for cell in cells
            if _is_ablation(cell) == (name == "ablation") or cell["variant"] == CHAMPION
        ]
        data = sorted({cell["data"] for cell in chosen})
        if not data or (name == "ablation" and not any(map(_is_ablation, chosen))):
            continue
        figure = Figure(figsize=(width * len(data), 4), layout="constrained")
        for axes, one in zip(figure.subplots(1, len(data), squeeze=False)[0], data, strict=True):
            axes.set_title(one, loc="left", fontweight="bold")
            draw_axes(axes, by_variant([cell for cell in chosen if cell["data"] == one]))
        drawn[name] = figure
    return drawn


def _is_ablation(cell: dict[str, Any]) -> bool:
    return cell["variant"].startswith(f"{CHAMPION}-")


def _draw_bands(axes: Axes, groups: dict[str, Cells]) -> None:
    """NDCG@10 by training popularity of the held-out item, a bar per model."""
    counts = next(iter(groups.values()))[0]["test"]["full"]["bands"]
    bands = [name for name, _, _ in POPULARITY_BANDS if counts[name]["count"]]
    width = 0.8 / len(groups)
    for i, (variant, cells) in enumerate(groups.items()):
        places = [x + (i - (len(groups) - 1) / 2) * width for x in range(len(bands))]
        means = [mean_metric(cells, "full", band) for band in bands]
        axes.bar(places, means, width * 0.9, color=_COLORS[variant], label=variant)
    axes.set_xticks(range(len(bands)), [f"{band}\n{counts[band]['count']:,} users" for band in bands])
    axes.set_xlabel("training interactions of the held-out item")
    axes.set_ylabel("NDCG@10")
    axes.legend(frameon=False, fontsize=8)


def _draw_seesaw(axes: Axes, groups: dict[str, Cells]) -> None:
    """Head against tail: small points are seeds, large ones their means; up and right is better.

    A line is the model with popularity added to its scores or taken from them.
    """
    for variant, cells in groups.items():
        axes.plot(*balance_curve(cells), color=_COLORS[variant], linewidth=1, alpha=0.6)
        for cell in cells:
            axes.plot(*_head_and_tail([cell]), "o", color=_COLORS[variant], markersize=3, alpha=0.6)
        axes.plot(*_head_and_tail(cells), "o", color=_COLORS[variant], markersize=8, label=variant)
    axes.margins(0.2)
    axes.set_xlabel("NDCG@10, head\n(line: less .. more popularity in the scores)")
    axes.set_ylabel("NDCG@10, tail")
    axes.legend(frameon=False, fontsize=8)


def _head_and_tail(cells: Cells) -> tuple[float, float]:
    return mean_metric(cells, "full", "head"), mean_metric(cells, "full", "tail")


def _draw_ablation(axes: Axes, groups: dict[str, Cells]) -> None:
    """What leaving a part out changes: to the left the part earns its place."""
    if CHAMPION not in groups:
        return
    pairs = {v: of_common_seeds(groups[CHAMPION], group) for v, group in groups.items() if v != CHAMPION}
    pairs = {variant: pair for variant, pair in pairs.items() if pair[0]}
    for offset, group in ((-0.27, "overall"), (0, "head"), (0.27, "tail")):
        values = [[mean_metric(cells, "full", group) for cells in pair] for pair in pairs.values()]
        changes = [100 * (after / before - 1) if before > 0 else 0.0 for before, after in values]
        axes.barh([y + offset for y in range(len(pairs))], changes, 0.25, label=group)
    axes.set_yticks(range(len(pairs)), [v.removeprefix(f"{CHAMPION}-").replace("-", " ") for v in pairs])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel(f"change of NDCG@10 against {CHAMPION}, %")
    axes.legend(frameon=False, fontsize=8)

"""Comparisons as a table, as JSON and as a picture."""

import io
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from h2rec._files import replacing

from ._harness import Comparison
from ._plot import draw_ratios

HEADER = ("case", "shape", "column", "median", "ratio", "spread", "rate", "peak memory")
DISTURBED_CPUS = 0.1  # a small machine has a daemon or two; more than this is seen in the times
FOOTNOTE = (
    "* baseline. ratio = baseline's median / column's, above 1 is faster; spread = its range over the rounds"
)


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One row per column of the comparison, and one for its yardstick; cells as in HEADER."""
    rows = []
    for column in comparison.columns:
        ratio = comparison.ratio(column.name)
        is_baseline = column.name == comparison.baseline
        rows.append(
            (
                comparison.case,
                comparison.shape,
                column.name + (" *" if is_baseline else ""),
                format_seconds(column.median),
                f"{ratio.of_medians:.2f}",
                "" if is_baseline else f"{ratio.lowest:.2f}..{ratio.highest:.2f}",
                _rate_cell(comparison, column.name),
                "" if column.peak_bytes is None else format_amount(column.peak_bytes, "B"),
            )
        )
    if comparison.yardstick is not None:
        rate = comparison.rate
        per_second = rate.yardstick_per_call / comparison.yardstick.median
        median = format_seconds(comparison.yardstick.median)
        cells = (f"({rate.yardstick})", median, "", "", format_amount(per_second, rate.unit) + "/s", "")
        rows.append((comparison.case, comparison.shape, *cells))
    return rows


def _rate_cell(comparison: Comparison, name: str) -> str:
    if comparison.rate is None:
        return ""
    rate = format_amount(comparison.work_per_second(name), comparison.rate.unit)
    return f"{rate}/s, {comparison.share_of_yardstick(name):.0%}"


def format_seconds(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_amount(amount: float, unit: str) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{amount / scale:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}"


def render_tables(comparisons: Sequence[Comparison], width: int) -> str:
    """A table per operator; columns that would be empty are left out."""
    by_operator = groupby(sorted(comparisons, key=lambda c: c.operator), key=lambda c: c.operator)
    parts = []
    for operator, group in by_operator:
        rows = [HEADER, *(row for comparison in group for row in _without_repeats(table_rows(comparison)))]
        columns = [cells for cells in zip(*rows, strict=True) if any(cells[1:])]
        header, *body = zip(*columns, strict=True)
        parts.append(_render(operator, header, body, width))
    return "\n".join([*parts, FOOTNOTE, *_disturbances(comparisons)])


def _disturbances(comparisons: Iterable[Comparison]) -> list[str]:
    lines = [
        f"  {c.operator} {c.case} {c.shape}: {c.others_cpus:.1f} processors"
        for c in comparisons
        if c.others_cpus is not None and c.others_cpus > DISTURBED_CPUS
    ]
    return ["DISTURBED, do not quote: others worked on this machine during", *lines] if lines else []


def _without_repeats(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Case and shape stand in the first row of a comparison only."""
    return [row if i == 0 else ("", "", *row[2:]) for i, row in enumerate(rows)]


def _render(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], width: int) -> str:
    table = Table(title=title, title_justify="left")
    for name in header:
        right = name in ("median", "ratio", "peak memory")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for i, row in enumerate(rows):
        if i and row[0]:
            table.add_section()
        table.add_row(*map(escape, row))
    # A cut number is worse than a long line.
    needed = Console(width=10_000, file=io.StringIO()).measure(table).maximum
    text = io.StringIO()
    Console(width=max(width, needed), file=text).print(table)
    return text.getvalue().rstrip()


def as_json(comparisons: Iterable[Comparison], machine: dict[str, Any]) -> dict[str, Any]:
    return {"machine": machine, "comparisons": [_comparison_json(comparison) for comparison in comparisons]}


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    columns = []
    for column in comparison.columns:
        ratio = comparison.ratio(column.name)
        columns.append(
            {
                "name": column.name,
                "median_s": column.median,
                "min_s": min(column.seconds),
                "max_s": max(column.seconds),
                "ratio": ratio.of_medians,
                "ratio_min": ratio.lowest,
                "ratio_max": ratio.highest,
                "loops": column.loops,
                "seconds": column.seconds,
                "peak_extra_bytes": column.peak_bytes,
                "work_per_s": comparison.work_per_second(column.name),
                "share_of_yardstick": comparison.share_of_yardstick(column.name),
            }
        )
    result = {
        "operator": comparison.operator,
        "case": comparison.case,
        "shape": comparison.shape,
        "device": comparison.device,
        "baseline": comparison.baseline,
        "others_cpus": comparison.others_cpus,
        "columns": columns,
    }
    if comparison.rate is not None:
        result["rate"] = {
            "unit": comparison.rate.unit,
            "per_call": comparison.rate.per_call,
            "yardstick": comparison.rate.yardstick,
            "yardstick_per_s": comparison.rate.yardstick_per_call / comparison.yardstick.median,
        }
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def write_png(path: Path, comparisons: Sequence[Comparison], caption: str) -> None:
    """Bars of the ratios, with their spread."""
    with replacing(path) as temporary:
        draw_ratios(comparisons, caption).savefig(temporary, dpi=120)

"""Where the command writes, and the tables that it prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from h2rec.training.report import ReportedRun

output = Console()
errors = Console(stderr=True)

_GROUPS = (("overall", "all"), ("head", "head"), ("tail", "tail"))
_METRICS = ("HR@10", "NDCG@10")


def say_where(what: str, path: Path) -> None:
    """Says where something is; brackets in a path are no markup."""
    output.print(Text.assemble(what, " ", (str(path), "bold")), soft_wrap=True)


def head_tail_table(run: ReportedRun, protocol: str, title: str) -> Table:
    """The models of a run, on all, head and tail items; best value bold, relative difference to hash only below."""
    users, head, tail = (f"{run.count(group):,}" for group, _ in _GROUPS)
    compared = "\nin percent: relative to hash" if len(run.models) > 1 and "hash" in run.models else ""
    table = Table(
        title=f"[bold]{title}[/]\n{users} users: {head} with a head item next, {tail} with a tail item{compared}",
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
    )
    table.add_column("model", vertical="top")
    columns = [(group, name, metric) for group, name in _GROUPS for metric in _METRICS]
    for _, name, metric in columns:
        table.add_column(f"{name}\n{metric}", justify="right")
    best = {
        (group, metric): max(run.value(model, protocol, group, metric) for model in run.models)
        for group, _, metric in columns
    }
    for model in run.models:
        cells = []
        for group, _, metric in columns:
            value = run.value(model, protocol, group, metric)
            gain = run.gain(model, protocol, group, metric)
            style = "bold green" if value == best[group, metric] and len(run.models) > 1 else ""
            below = "" if math.isnan(gain) else f"\n{gain:+.1%}"
            cells.append(Text.assemble((f"{value:.4f}", style), (below, "dim")))
        table.add_row(model, *cells)
    return table


def print_results(run: ReportedRun) -> None:
    """Both rankings of a run."""
    ranking = run.metrics["ranking"]
    history = "without" if ranking["history_masked"] else "with"
    output.print()
    output.print(head_tail_table(run, "full", f"Full ranking, {history} the user's history"))
    output.print()
    output.print(head_tail_table(run, "sampled", f"Ranking against {ranking['negatives']} sampled negatives"))
    output.print()

"""``h2rec recommend``: what comes next for a user, or after a history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from h2rec.cli.console import output as console

if TYPE_CHECKING:
    import numpy as np

    from h2rec.data import ItemCatalog

_SHOWN_HISTORY = 5


def recommend(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that h2rec train made.")],
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="A user of the log that the run was trained on.")
    ] = None,
    history: Annotated[
        str | None, typer.Option(metavar="IDS", help="Item ids instead, oldest first: 50,181,174.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="h2rec, or the run's last", help="Which model recommends."),
    ] = None,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many items.")] = 10,
    keep_history: Annotated[
        bool, typer.Option("--keep-history", help="Recommend what the user already had, too.")
    ] = False,
) -> None:
    """Print the items that a trained model expects next.

    \b
    Example:
        h2rec recommend runs/demo --user 42
        h2rec recommend runs/demo --history 50,181,174 --model sum -k 5
    """
    from h2rec.training import TrainConfig, load_model
    from h2rec.training.config import main_model
    from h2rec.training.recommend import item_history, recommend, user_history

    if (user is None) == (history is None):
        raise ValueError("recommend needs either --user or --history")
    name = model or main_model(TrainConfig.of_run(run).models)
    trained, config, catalog, _ = load_model(run, name)
    if user is None:
        items = item_history(catalog, [item.strip() for item in history.split(",")])
    else:
        items = user_history(config, catalog, user)
    (best,) = recommend(trained, catalog, [items], count, exclude_history=not keep_history)

    console.print(f"{_described(items, catalog)}\n", highlight=False, markup=False)
    table = Table(title=f"Next, says {name}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", justify="right", style="dim")
    table.add_column("item", style="dim")
    if catalog.titles is not None:
        table.add_column("title")
    table.add_column("score", justify="right")
    for place, (item, title, score) in enumerate(best, start=1):
        titles = () if title is None else (Text(title),)
        table.add_row(str(place), Text(str(item)), *titles, f"{score:.3f}")
    console.print(table)


def _described(items: np.ndarray, catalog: ItemCatalog) -> str:
    names = catalog.titles or catalog.ids
    latest = "; ".join(str(names[int(item)]) for item in items[: -_SHOWN_HISTORY - 1 : -1])
    return f"{len(items)} items so far, the latest first: {latest}{'; ...' if len(items) > _SHOWN_HISTORY else ''}"

"""``h2rec refit``: a model of a run, trained again on everything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2rec.cli.console import say_where


def refit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that h2rec train made.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the new run, made by this command.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="h2rec, or the run's last", help="Which model."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(show_default="as in the run", help="Processes that share the run's steps."),
    ] = None,
) -> None:
    """Train a model of a run again for serving: on all interactions, for as many epochs as were best in the run.

    What train holds out to compare models, the two latest items of each user, is trained on, too.
    The log is read as it is now; items and semantic IDs are those of the run.

    \b
    Example:
        h2rec refit runs/shop runs/shop-all
        h2rec recommend runs/shop-all --user 42
        h2rec train -o runs/shop-all --resume  # if it was interrupted
    """
    from h2rec.training import refit_run
    from h2rec.training.processes import is_first_process

    refit_run(run, output, model, devices=devices)
    if is_first_process():
        say_where("The model, trained on everything, is in", output)

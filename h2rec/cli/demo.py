"""``h2rec demo``: the other commands, one after the other, on MovieLens-100k."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from h2rec.cli.console import output as console
from h2rec.cli.recommend import print_recommendations
from h2rec.cli.tokenize import embed, make_semantic_ids, write_vectors
from h2rec.cli.train import train_and_report

_LEVELS, _CODEBOOK_SIZE = 4, 64
_EXAMPLE_USER = "42"


def demo(
    run: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Most epochs of a model.")] = 60,
    force: Annotated[
        bool, typer.Option("--force", help="Delete what an earlier demo left and start anew.")
    ] = False,
) -> None:
    """Train on MovieLens-100k: semantic IDs, four models, the table, the report, a recommendation.

    Needs no network: the data comes with the recbole package, of which nothing else is used. Run it again to go on
    where it was interrupted, or to see the results again.

    Example:

    \b
        pip install "h2rec[train,text]" && pip install --no-deps recbole
        h2rec demo
    """
    log, catalog = movielens_files()
    made = run.with_name(f"{run.name}-items")
    if force:
        _delete_run(run)
    _tokenize(catalog, made)
    _train(log, catalog, made, run, epochs)
    _show_command("recommend", run, "--user", _EXAMPLE_USER)
    print_recommendations(run, user=_EXAMPLE_USER)


def movielens_files() -> tuple[Path, Path]:
    """The log and the items of MovieLens-100k in the installed recbole package, which is not imported."""
    package = importlib.util.find_spec("recbole")
    for folder in (package and package.submodule_search_locations) or ():
        data = Path(folder) / "dataset_example" / "ml-100k"
        files = data / "ml-100k.inter", data / "ml-100k.item"
        if all(file.is_file() for file in files):
            return files
    raise FileNotFoundError(
        "MovieLens-100k is not here. It comes with the recbole package, which is used for nothing else:\n\n"
        "    pip install --no-deps recbole\n\n"
        "Without a network, train on a log of your own:\n\n"
        "    h2rec tokenize --items items.csv --item item_id --text title --output sids.safetensors\n"
        "    h2rec train --interactions log.csv --user user_id --item item_id --items items.csv --title title \\\n"
        "        --sids sids.safetensors --output runs/mine"
    )

"""``h2rec demo``: the other commands, one after the other, on MovieLens-100k."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from h2rec.cli.console import output as console

_USER = "42"


def demo(
    context: typer.Context,
    run: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Most epochs of a model.")] = 40,
    force: Annotated[
        bool, typer.Option("--force", help="Delete what an earlier demo left, and start anew.")
    ] = False,
) -> None:
    """Train on MovieLens-100k: semantic IDs, four models, the table, the report, a recommendation.

    Needs no network: films and ratings come with the recbole package. Repeated, it goes on where it was interrupted.

    \b
    Example:
        pip install "h2rec\\[train,text]" && pip install --no-deps recbole
        h2rec demo
    """
    log, items = movielens_files()
    made = run.with_name(f"{run.name}-items")
    sids, vectors = made / "sids.safetensors", made / "embeddings.npy"
    if force and run.exists():
        _delete(run)

    console.rule("[bold]1. Semantic IDs, from titles and genres", align="left")
    if force or not (sids.exists() and vectors.exists()):
        texts = ("--text", "movie_title", "--text", "class")
        sizes = ("--levels", "4", "--codebook-size", "64")
        files = ("--output", sids, "--save-embeddings", vectors, "--force")
        _run(context, "tokenize", "--items", items, *texts, *sizes, *files)
    else:
        console.print(f"They are in {made} already.", highlight=False, markup=False, soft_wrap=True)

    console.rule("[bold]2. Four models, trained and compared by the same rules", align="left")
    if (run / "config.json").exists():
        console.print(
            f"{run} exists; going on with it (--force starts anew).",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        _run(context, "train", "--output", run, "--resume")
    else:
        data = ("--interactions", log, "--items", items, "--title", "movie_title")
        ids = ("--sids", sids, "--embeddings", vectors)
        # 943 users: small batches, or an epoch would be four steps.
        pace = ("--batch-size", 64, "--epochs", epochs, "--patience", 5)
        _run(context, "train", *data, *ids, *pace, "--output", run)

    console.rule("[bold]3. What to watch next", align="left")
    _run(context, "recommend", run, "--user", _USER)


def movielens_files() -> tuple[Path, Path]:
    """The log and the items of MovieLens-100k in the installed recbole package, which is not imported."""
    package = importlib.util.find_spec("recbole")
    for folder in (package and package.submodule_search_locations) or ():
        data = Path(folder) / "dataset_example" / "ml-100k"
        files = data / "ml-100k.inter", data / "ml-100k.item"
        if all(file.is_file() for file in files):
            return files
    raise FileNotFoundError(
        "MovieLens-100k is not installed. It comes with the recbole package, of which nothing else is used:\n\n"
        "    pip install --no-deps recbole\n\n"
        "Without a network, train on a log of your own:\n\n"
        "    h2rec tokenize --items items.csv --text title --output sids.safetensors\n"
        "    h2rec train --interactions log.csv --items items.csv --title title \\\n"
        "        --sids sids.safetensors --output runs/mine"
    )


def _run(context: typer.Context, *arguments: object) -> None:
    """One of the other commands, in this process, shown as a user would type it."""
    words = [str(argument) for argument in arguments]
    console.print(Text(f"$ h2rec {shlex.join(words)}\n", style="dim"), soft_wrap=True)
    code = context.parent.command.main(words, prog_name="h2rec", standalone_mode=False)
    if code:
        raise typer.Exit(code)
    console.print()


def _delete(run: Path) -> None:
    if not (run / "config.json").is_file():
        raise FileExistsError(f"{run} is not the folder of a run, so --force does not delete it")
    shutil.rmtree(run)

"""``h2rec tokenize``: semantic IDs for a catalog."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from h2rec.cli.console import output as console
from h2rec.cli.files import check_writable, write_vectors

if TYPE_CHECKING:
    import numpy as np

    from h2rec import SemanticIds


def tokenize(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The semantic IDs, as safetensors.")
    ] = Path("sids.safetensors"),
    items: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Items with a text: .parquet, .csv, .tsv or RecBole's .item."),
    ] = None,
    item: Annotated[str, typer.Option(metavar="COLUMN", help="Column of the item ids.")] = "item_id",
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Column of what describes an item; several are joined."),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Content vectors instead of text, row r is item r: .npy or .safetensors."
        ),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(min=1, show_default="4, or one per codebook size", help="Codes of an item."),
    ] = None,
    codebook_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Codewords of a level; or one number per level: 128,256,256,256."),
    ] = "256",
    iterations: Annotated[int, typer.Option(min=1, help="Most k-means steps of a level.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same codes.")] = 0,
    save_embeddings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the vectors of the texts, as .npy.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Turn a catalog into semantic IDs, from texts or from content vectors.

    Item r of the result is row r of the items, or of the vectors.

    Example:

    \b
        h2rec tokenize --items items.csv --item asin --text title --text category
        h2rec tokenize --embeddings vectors.npy --levels 3 --codebook-size 512
    """
    for file in filter(None, (output, save_embeddings)):
        check_writable(file, force)
    sizes = _codebook_sizes(codebook_size, levels)
    vectors = _read_vectors(items, item, text, embeddings)
    if save_embeddings is not None:
        write_vectors(vectors, save_embeddings)
    make_semantic_ids(vectors, sizes, output, iterations=iterations, seed=seed)


def make_semantic_ids(
    vectors: np.ndarray, sizes: list[int], path: Path, *, iterations: int = 25, seed: int = 0
) -> SemanticIds:
    """Learns semantic IDs, with a progress bar, saves them and says how well they tell the items apart."""
    from h2rec.tokenizers import RQKMeans

    tokenizer = RQKMeans(len(sizes), sizes, num_iters=iterations, seed=seed)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[error]}"),
        console=console,
    ) as progress:
        task = progress.add_task("k-means", total=len(sizes) * iterations, error="")

        def show(level: int, step: int, error: float) -> None:
            progress.update(
                task,
                completed=level * iterations + step + 1,
                description=f"level {level + 1} of {len(sizes)}",
                error=f"mean squared distance {error:.4g}",
            )

        tokenizer.fit(vectors, progress=show)
        progress.update(task, completed=len(sizes) * iterations)
    sids = tokenizer.tokenize(vectors)
    path.parent.mkdir(parents=True, exist_ok=True)
    sids.save(path)
    console.print(sids.stats().table(), highlight=False)
    console.print(f"\nSemantic IDs are in [bold]{path}[/]", highlight=False)
    return sids


def embed(texts: list[str]) -> np.ndarray:
    """Content vectors ``[N, D]`` of texts, while a spinner turns."""
    from h2rec import data

    with console.status(f"Embedding {len(texts):,} texts"):
        return data.embed_texts(texts)


def _read_vectors(
    items: Path | None, item: str, text: list[str] | None, embeddings: Path | None
) -> np.ndarray:
    from h2rec import data

    if (embeddings is None) == (not text):
        raise ValueError("tokenize needs either --items with --text, or --embeddings")
    if text:
        if items is None:
            raise ValueError("--text names a column of --items, which is missing")
        return embed(data.read_items(items, item=item, text=text).texts)
    num_items = None if items is None else data.read_items(items, item=item).num_items
    return data.read_embeddings(embeddings, num_items=num_items)


def _codebook_sizes(sizes: str, levels: int | None) -> list[int]:
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or (levels and len(numbers) not in (1, levels)):
        each = f" or {levels}, one per level," if levels else ", or one per level,"
        raise ValueError(f"--codebook-size: expected one positive number{each} got {sizes!r}")
    return numbers if len(numbers) > 1 else numbers * (levels or 4)

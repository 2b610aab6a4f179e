"""``h2rec tokenize``: semantic IDs for a catalog."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2rec.cli.console import errors, say_where
from h2rec.cli.console import output as console
from h2rec.cli.files import check_writable, write_vectors
from h2rec.cli.tokenizing import Collisions, Method, Settings, encoder_path, judge, learn
from h2rec.cli.tokenizing import append as append_items

if TYPE_CHECKING:
    from h2rec.cli.tokenizing import Vectors

_VECTORS, _CODES, _COLLISIONS = "Vectors", "Codes", "Items that share a semantic ID"
_FILES = "files.json"
_REPORTS = (".json", ".png", ".svg", ".pdf")
# Vectors up to this size, in fp32, are kept in memory.
_IN_MEMORY_BYTES = 128 << 20


def tokenize(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The semantic IDs, as safetensors.")
    ] = Path("sids.safetensors"),
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_VECTORS,
            help="Items with a text: .parquet, .csv, .tsv or RecBole's .item.",
        ),
    ] = None,
    item: Annotated[
        str, typer.Option(metavar="COLUMN", rich_help_panel=_VECTORS, help="Column of the item ids.")
    ] = "item_id",
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            rich_help_panel=_VECTORS,
            help="Column of what describes an item; several are joined.",
        ),
    ] = None,
    save_embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_VECTORS, help="Keep the vectors of the texts, as .npy."
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_VECTORS,
            help="Content vectors instead of text, row r is item r: .npy, .safetensors or .parquet, of any size.",
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            rich_help_panel=_VECTORS,
            show_default="the only one with lists",
            help="Column of the vectors in a .parquet.",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            rich_help_panel=_CODES,
            show_default="rq-kmeans",
            help="k-means on residuals, a residual quantizer in an autoencoder, or product quantization.",
        ),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_CODES,
            show_default="4, or one per codebook size",
            help="Codes of an item.",
        ),
    ] = None,
    codebook_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_CODES,
            show_default="256",
            help="Codewords of a level; or one number per level: 128,256,256,256.",
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_CODES,
            show_default="25 (rq-vae: 20)",
            help="Most k-means steps of a level; epochs of rq-vae.",
        ),
    ] = None,
    mini_batch: Annotated[
        bool,
        typer.Option(
            "--mini-batch",
            rich_help_panel=_CODES,
            help="Move codewords after each batch, not each pass: 8 iterations do.",
        ),
    ] = False,
    balance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            rich_help_panel=_CODES,
            show_default="0",
            help="Price of crowded codewords in k-means; 0.5 makes them clearly more even.",
        ),
    ] = None,
    beam_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_CODES,
            show_default="1",
            help="Candidates that are kept per level while codes are chosen: slower, more exact.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, rich_help_panel=_CODES, show_default="0", help="The same seed gives the same codes."
        ),
    ] = None,
    collisions: Annotated[
        Collisions | None,
        typer.Option(
            rich_help_panel=_COLLISIONS,
            show_default="keep",
            help="Move some to the next best last code, or number them at one more level.",
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_COLLISIONS,
            show_default="1",
            help="Items that may share one, with --collisions next-best.",
        ),
    ] = None,
    append: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Semantic IDs that stay as they are; the vectors are those of new items, which get the next rows.",
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Write the quality report, too: .json, .png, .svg or .pdf; may be repeated."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Turn a catalog into semantic IDs, from texts or from content vectors.

    Item r of the result is row r of the items, or of the vectors. Interrupted, the same command goes on where it was.

    \b
    Example:
        h2rec tokenize --items items.csv --item asin --text title --text category
        h2rec tokenize --embeddings vectors.npy --levels 3 --codebook-size 512
        h2rec tokenize --embeddings vectors.npy --method rq-vae --report q.png
        h2rec tokenize --embeddings vectors.npy --collisions next-best
        h2rec tokenize --append sids.safetensors --embeddings new.npy \\
            -o longer.safetensors
    """
    learning = {
        "--method": method,
        "--levels": levels,
        "--codebook-size": codebook_size,
        "--iterations": iterations,
        "--mini-batch": mini_batch or None,
        "--balance": balance,
        "--beam-size": beam_size,
        "--seed": seed,
        "--collisions": collisions,
        "--capacity": capacity,
    }
    given = [name for name, value in learning.items() if value is not None]
    if append is not None and given:
        raise ValueError(
            f"{given[0]} does not go with --append: new items get codes as the published ones did"
        )
    if capacity is not None and collisions is not Collisions.NEXT_BEST:
        raise ValueError("--capacity goes with --collisions next-best")
    if save_embeddings is not None and not text:
        raise ValueError("--save-embeddings keeps the vectors of --text, which is missing")
    settings = Settings(
        method or Method.RQ_KMEANS,
        _codebook_sizes(codebook_size or "256", levels),
        iterations,
        mini_batch,
        balance or 0.0,
        beam_size or 1,
        seed or 0,
        collisions or Collisions.KEEP,
        capacity or 1,
    )
    reports = report or []
    for file in reports:
        if file.suffix.lower() not in _REPORTS:
            raise ValueError(f"--report: expected one of {', '.join(_REPORTS)}, got {file}")
    encoder, unfinished = encoder_path(output), output.with_name(f"{output.name}.unfinished")
    files = list(filter(None, (output, save_embeddings, *reports)))
    if settings.method is Method.RQ_VAE or (append is not None and encoder_path(append).exists()):
        files.append(encoder)
    interrupted = _files_of(unfinished)
    for file in files:
        check_writable(file, force or file.absolute() in interrupted)
    own = [file for file in files if file.absolute() in interrupted or not file.exists()]
    vectors = _read_vectors(items, item, text, embeddings, column)
    with _work_in(unfinished, own) as folder:
        if save_embeddings is not None:
            write_vectors(vectors, save_embeddings)
        made = (
            append_items(append, vectors, folder) if append is not None else learn(vectors, settings, folder)
        )
        if append is not None:
            judge(made, reports)  # not after it: to go on would append what has been appended
        if made.encoder is not None:
            made.encoder.save(encoder)
        made.sids.save(output)
        if append is None:
            judge(made, reports)
    say_where("\nSemantic IDs are in", output)
    if made.encoder is not None:
        say_where("New items will need", encoder)


@contextmanager
def _work_in(folder: Path, own: list[Path]) -> Iterator[Path]:
    """The folder that an interrupted command leaves with its work, and with the names of the files that are its own.

    It is deleted in the end, and after an error that would come again.
    """
    from h2rec._files import replacing
    from h2rec.tokenizers import remove_checkpoints

    def delete() -> None:
        (folder / _FILES).unlink(missing_ok=True)
        remove_checkpoints(folder)

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder / _FILES) as temporary:
            temporary.write_text(json.dumps([str(file.absolute()) for file in own]), encoding="utf-8")
        yield folder
    except (ValueError, TypeError, FloatingPointError):
        delete()
        raise
    except BaseException:
        has_work = any(path.name != _FILES for path in folder.iterdir()) if folder.exists() else False
        if has_work or any(file.exists() for file in own):
            what = f"The same command goes on with what is in {folder}"
            errors.print(what, highlight=False, markup=False, soft_wrap=True)
        else:
            delete()
        raise
    delete()


def _files_of(folder: Path) -> set[Path]:
    """What only a command that was interrupted can have written, so that it may be replaced."""
    path = folder / _FILES
    return {Path(file) for file in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else set()


def _read_vectors(
    items: Path | None, item: str, text: list[str] | None, embeddings: Path | None, column: str | None
) -> Vectors:
    import torch

    from h2rec import data
    from h2rec.tokenizers import open_vectors

    if (embeddings is None) == (not text):
        raise ValueError("tokenize needs either --items with --text, or --embeddings")
    if text:
        if items is None:
            raise ValueError("--text names a column of --items, which is missing")
        if column is not None:
            raise ValueError("--column is for the parquet file of --embeddings, which is missing")
        texts = data.read_items(items, item=item, text=text).texts
        with console.status(f"Embedding {len(texts):,} texts"):
            return data.embed_texts(texts)
    vectors = open_vectors(embeddings, column=column)
    if items is not None and (num_items := data.read_items(items, item=item).num_items) != len(vectors):
        raise ValueError(
            f"{embeddings}: expected {num_items} rows, one per item of {items}, got {len(vectors)}"
        )
    if 4 * len(vectors) * vectors.shape[1] > _IN_MEMORY_BYTES:
        return vectors
    return torch.cat(list(vectors()))


def _codebook_sizes(sizes: str, levels: int | None) -> list[int]:
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or (levels and len(numbers) not in (1, levels)):
        each = f" or {levels}, one per level," if levels else ", or one per level,"
        raise ValueError(f"--codebook-size: expected one positive number{each} got {sizes!r}")
    return numbers if len(numbers) > 1 else numbers * (levels or 4)

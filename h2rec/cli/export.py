"""``h2rec export``: a trained model as files that serve without h2rec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from h2rec.cli.console import output as console
from h2rec.cli.files import check_folder_of

_WHAT = {
    "export.json": "sizes, the padding id, and what was measured",
    "items.safetensors": "vectors that users are scored against, by inner product",
    "sids.safetensors": "semantic IDs, as h2rec reads them",
    "sids.parquet": "raw item ids and their codes",
    "user_encoder.pt2": "item ids and lengths to user vectors: torch.export.load",
    "user_encoder_aot.pt2": "the same, compiled: torch._inductor.aoti_load_package",
    "items.faiss": "index of the vectors: faiss.read_index",
}


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that h2rec train made.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="h2rec, or the run's last", help="Which model."),
    ] = None,
    aot: Annotated[
        bool,
        typer.Option("--aot", help="Compile the user encoder by AOTInductor, too; needs a C++ compiler."),
    ] = False,
    faiss: Annotated[
        bool,
        typer.Option("--faiss", help="Build an approximate index, too, and measure what it finds."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Take the place of an earlier export.")] = False,
) -> None:
    """Write what serving needs, in formats that are read without h2rec: item vectors, semantic IDs, user encoder.

    \b
    Example:
        h2rec export runs/shop exported/shop
        h2rec export runs/shop exported/sum --model sum --faiss --aot
    """
    from h2rec.training import TrainConfig
    from h2rec.training.config import main_model
    from h2rec.training.export import export_run

    check_folder_of(output)
    name = model or main_model(TrainConfig.of_run(run).models)
    with console.status(Text(f"Exporting {name}")):
        description = export_run(run, name, output, aot=aot, faiss=faiss, force=force)
    table = Table(
        title=Text(f"{name} in {output}"), title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    table.add_column("file")
    table.add_column("MB", justify="right")
    table.add_column("what", style="dim")
    for file, what in _WHAT.items():
        if (output / file).exists():
            table.add_row(file, f"{(output / file).stat().st_size / 1e6:,.1f}", what)
    console.print(table)
    if faiss:
        found = description["faiss"]
        console.print(
            f"The index {found['index']} finds {found['recall@10']:.1%} of the exact 10 best items "
            f"of {found['users']:,} users of the run."
        )

"""``h2rec train``: H2Rec and the models that it is compared with, on one log."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h2rec.cli.console import print_results, say_where

if TYPE_CHECKING:
    from h2rec.training import TrainConfig

_DATA, _MODEL, _TRAINING, _EVALUATION = "Data", "Model", "Training", "Evaluation"


def train(
    context: typer.Context,
    run: Annotated[
        Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run, made by this command.")
    ],
    interactions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_DATA, help="Log: .parquet, .csv, .tsv or RecBole's .inter."
        ),
    ] = None,
    sids: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_DATA, help="Semantic IDs that h2rec tokenize wrote."),
    ] = None,
    user_column: Annotated[
        str | None,
        typer.Option(
            "--user", metavar="COLUMN", rich_help_panel=_DATA, show_default="user_id", help="User ids."
        ),
    ] = None,
    item_column: Annotated[
        str | None,
        typer.Option(
            "--item",
            metavar="COLUMN",
            rich_help_panel=_DATA,
            show_default="item_id",
            help="Item ids, in both files.",
        ),
    ] = None,
    order_column: Annotated[
        str | None,
        typer.Option(
            "--order",
            metavar="COLUMN",
            rich_help_panel=_DATA,
            show_default="timestamp, time or order, else the order of the rows",
            help="When it happened: a time or a position.",
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_DATA,
            help="The tokenized items; needed unless the item ids are rows, 0 to N - 1.",
        ),
    ] = None,
    title_column: Annotated[
        str | None,
        typer.Option(
            "--title", metavar="COLUMN", rich_help_panel=_DATA, help="Column of --items to call an item by."
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_DATA,
            help="Content vectors: the hash tables of all models but hash start from them, and target smoothing "
            "takes the items that are alike by them (up to 50,000 items).",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=_MODEL,
            show_default="hash,semantic,sum,h2rec",
            help="What to train.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODEL,
            show_default="none",
            help="Settings that the other options change: paper, as H2Rec's authors ran it.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODEL,
            show_default="sasrec",
            help="Of every model: sasrec, gru4rec or bert4rec.",
        ),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(rich_help_panel=_MODEL, show_default="64", help="Size of the vectors.")
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option("--layers", rich_help_panel=_MODEL, show_default="2", help="Layers of a backbone."),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option("--heads", rich_help_panel=_MODEL, show_default="2", help="Attention heads.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(rich_help_panel=_MODEL, show_default="50", help="The latest items that a model reads."),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(rich_help_panel=_MODEL, show_default="0.2", help="Dropout.")
    ] = None,
    mixing: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODEL,
            show_default="sum",
            help="How H2Rec's branches meet: sum, attention (the paper's) or residual_attention.",
        ),
    ] = None,
    alignment_weight: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_MODEL, show_default="0.0", help="H2Rec's alignment of items; 0 leaves it out."
        ),
    ] = None,
    granularity_weight: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_MODEL,
            show_default="0.0",
            help="H2Rec's alignment of users, with attention; 0 leaves it out.",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_TRAINING,
            show_default="auto",
            help="full_softmax, sampled_softmax, bce (the paper's) or auto: full where the catalog is small enough.",
        ),
    ] = None,
    num_negatives: Annotated[
        int | None,
        typer.Option(
            "--negatives",
            rich_help_panel=_TRAINING,
            show_default="1 for bce, 1024 for sampled_softmax",
            help="Negatives of bce (per position) and sampled_softmax (per batch).",
        ),
    ] = None,
    target_smoothing: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            show_default="0.3 for h2rec, 0 for the others",
            help="Share of a target's weight that goes to items of its kind, alike in content and in who chose them; "
            "of a rare target more, of a popular one less.",
        ),
    ] = None,
    table_optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_TRAINING,
            show_default="auto",
            help="Of the hash table: adamw, rowwise_adagrad (needs least memory), or auto: that for large catalogs.",
        ),
    ] = None,
    table_learning_rate: Annotated[
        float | None,
        typer.Option(rich_help_panel=_TRAINING, show_default="0.02", help="Of rowwise_adagrad."),
    ] = None,
    max_epochs: Annotated[
        int | None,
        typer.Option("--epochs", rich_help_panel=_TRAINING, show_default="200", help="Most epochs."),
    ] = None,
    steps_per_epoch: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            show_default="all users once",
            help="Batches of an epoch, after which it is validated.",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            show_default="10",
            help="Epochs to wait for a better validation NDCG@10.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(rich_help_panel=_TRAINING, show_default="256", help="Users per step and process."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(rich_help_panel=_TRAINING, show_default="0.001", help="Of AdamW.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(rich_help_panel=_TRAINING, show_default="0.0", help="Of AdamW.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(rich_help_panel=_TRAINING, show_default="0", help="Of everything that is drawn."),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=_TRAINING, show_default="auto", help="auto, cpu or gpu."
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(rich_help_panel=_TRAINING, show_default="1", help="Processes that train together."),
    ] = None,
    eval_users: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_EVALUATION,
            show_default="all; 10000 in large catalogs",
            help="How many users, drawn by the seed, are ranked.",
        ),
    ] = None,
    ranking_negatives: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_EVALUATION, show_default="100", help="Negatives of the sampled ranking."
        ),
    ] = None,
    mask_history: Annotated[
        bool | None,
        typer.Option(
            "--mask-history/--keep-history",
            rich_help_panel=_EVALUATION,
            show_default="mask-history",
            help="Leave a user's earlier items out of the full ranking, by which training stops.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was interrupted, with the settings it has."),
    ] = False,
) -> None:
    """Train H2Rec and the models that it improves on, compare them on head and tail items, and write a report.

    \b
    Example:
        h2rec train --interactions log.parquet --sids sids.safetensors -o runs/a
        h2rec train --preset paper --interactions log.parquet \\
            --sids sids.safetensors -o runs/paper
        h2rec train --interactions log.csv --user visitor --item asin \\
            --order time --items items.csv --title name \\
            --sids sids.safetensors -o runs/shop
        h2rec train -o runs/shop --resume
        torchrun --nproc-per-node 2 --no-python h2rec train -o runs/shop --resume
    """
    given = {
        name: value
        for name, value in context.params.items()
        if value is not None and name not in ("context", "run", "resume", "preset")
    }
    config = _config(given, preset, run, resume)

    # After the settings have been checked: Lightning takes seconds.
    from h2rec.training import train_run
    from h2rec.training.processes import is_first_process
    from h2rec.training.report import read_run

    train_run(config, run, resume=resume)
    if not is_first_process():
        return
    if config.hold_out:
        print_results(read_run(run))
        say_where("The report is", run / "report.html")
    else:
        say_where("The model, trained on everything, is in", run)


def _config(given: dict[str, Any], preset: str | None, run: Path, resume: bool) -> TrainConfig:
    from h2rec.training import TrainConfig
    from h2rec.training.config import PRESETS

    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    if "models" in given:
        given["models"] = tuple(name.strip() for name in given["models"].split(","))
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        given = {**PRESETS[preset], **given}
    if resume:
        # Its own settings, and what differs from them is for training to refuse.
        saved = TrainConfig.of_run(run)
        if "devices" in given and "batch_size" not in given:
            saved = saved.on_devices(given["devices"])
        return dataclasses.replace(saved, **given)
    for name in ("interactions", "sids"):
        if name not in given:
            raise ValueError(f"train needs --{name} (or --resume, to go on with the run in --output)")
    return TrainConfig.from_dict(given)

"""``h2rec evaluate``: the models of a run, ranked again by rules of one's choice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from h2rec.cli.console import errors, print_results, say_where
from h2rec.cli.console import output as console
from h2rec.cli.files import check_writable


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that h2rec train made.")],
    models: Annotated[
        str | None,
        typer.Option(metavar="NAMES", show_default="all of the run", help="Which of its models."),
    ] = None,
    ranking_negatives: Annotated[
        int | None,
        typer.Option(
            "--negatives", min=1, show_default="as in training", help="Negatives of the sampled ranking."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, show_default="as in training", help="Which negatives are drawn.")
    ] = None,
    eval_users: Annotated[
        int | None,
        typer.Option(
            "--users",
            min=1,
            show_default="as in training",
            help="How many users, drawn by the run's seed, are ranked.",
        ),
    ] = None,
    mask_history: Annotated[
        bool | None,
        typer.Option(
            "--mask-history/--keep-history",
            show_default="as in training",
            help="Leave a user's earlier items out of the full ranking.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the metrics as JSON, too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Rank the test items again with the best checkpoints of a run, and print the table; the run stays as it is.

    \b
    Example:
        h2rec evaluate runs/shop
        h2rec evaluate runs/shop --models sum,h2rec --keep-history --negatives 500
    """
    from h2rec.training import TrainConfig, evaluate_model, load_model, read_split
    from h2rec.training.files import write_json
    from h2rec.training.inputs import eval_users as sampled_users
    from h2rec.training.inputs import log_change, read_catalog
    from h2rec.training.report import ReportedRun
    from h2rec.training.run import check_trained
    from h2rec.training.tiled_ranks import sweep_progress

    if output is not None:
        check_writable(output, force)
    config = TrainConfig.of_run(run)
    if not config.hold_out:
        raise ValueError(f"{run}: nothing was held out of this run's training, so there is nothing to rank")
    if eval_users is not None:
        config = dataclasses.replace(config, eval_users=eval_users)
    ranking = {
        "history_masked": config.mask_history if mask_history is None else mask_history,
        "negatives": ranking_negatives or config.ranking_negatives,
        "seed": config.seed if seed is None else seed,
    }
    names = config.models if models is None else [name.strip() for name in models.split(",")]
    check_trained(run, names)
    catalog = read_catalog(run / "items.parquet")
    split = read_split(config, catalog.num_items, catalog)
    if change := log_change(split, run):
        errors.print(
            f"The log has changed, and the test items with it: the run began with {change}", soft_wrap=True
        )
    users = sampled_users(config, split)
    ranking["users"] = None if users is None else len(users)
    metrics = {}
    for name in names:
        model = load_model(run, name)[0]
        with console.status(f"Ranking with {name}"):
            test = evaluate_model(
                model,
                split,
                "test",
                num_negatives=ranking["negatives"],
                mask_history=ranking["history_masked"],
                seed=ranking["seed"],
                users=users,
                progress=sweep_progress(name, model.num_items),
            )
        metrics[name] = {"test": test}
        del model  # before the next is made
    result = {"models": metrics, "ranking": ranking}
    print_results(ReportedRun(run.name, result, {}, {}))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
        say_where("The metrics are in", output)

"""A run: every model of a config, trained and evaluated by the same rules, into one directory."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from h2rec._files import partial, replacing
from h2rec.data import ItemCatalog
from h2rec.models import SequentialModel, build_model, model_settings
from h2rec.semantic_ids import SemanticIds
from h2rec.training.checkpoints import (
    EpochRecord,
    WholeCheckpoints,
    best_checkpoint,
    last_checkpoint,
    load_checkpoint,
)
from h2rec.training.config import TrainConfig
from h2rec.training.evaluation import metrics_of, rank_users, repeated_share
from h2rec.training.files import read_json, write_json
from h2rec.training.inputs import Inputs, read_catalog, read_inputs, write_catalog
from h2rec.training.losses import resolve_loss
from h2rec.training.module import Recommender, check_origin, train_batches
from h2rec.training.processes import (
    is_first_process,
    launched_group,
    launched_world_size,
    train_in_processes,
)
from h2rec.training.progress import progress_callback, quiet_lightning, say
from h2rec.training.related_items import RelatedItems
from h2rec.training.report import write_report
from h2rec.training.tiled_ranks import sweep_progress

# From this share of repeated test items on, of at most so many users, training says that rankings leave such items out.
_MANY_REPEATED = 0.05
_ASKED_USERS = 10_000


def train_run(
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    items_of: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates the models of a config, one after the other, and writes the report.

    The directory holds ``config.json``, ``items.parquet``, ``sids.safetensors``, ``data.json``, a folder for each model
    (``checkpoints/best.ckpt`` and ``last.ckpt``, ``metrics.csv`` by epoch, TensorBoard events, ``metrics.json``, and
    ``ranks.npz`` with every user's rank in the test), ``metrics.json`` and ``report.html``. If nothing is held out,
    there are neither ranks nor a report, and ``best.ckpt`` is of the last epoch.

    With ``config.devices`` above 1, as many processes are started; a script that calls this needs the guard
    ``if __name__ == "__main__"`` then. Where ``torchrun`` has started processes, all of them call this, and these are
    the ``devices``; on several machines ``run_dir`` must be one folder.

    Args:
        config: what to train.
        run_dir: a directory that does not exist, or is empty.
        resume: go on with the run in ``run_dir``, from the end of the last whole epoch. On a CPU the metrics are those
            of a run that was never interrupted. The number of processes may be another (`TrainConfig.on_devices`).
        items_of: another run, whose items, in their order, and semantic IDs a new one takes, whatever has become of the
            files that the config names. Its vectors have to be the same, its log may be another.

    Returns:
        the content of ``metrics.json``.

    Raises:
        FileExistsError: the directory holds something and ``resume`` is not set.
        FileNotFoundError: nothing to resume, or a file that the config names is not there.
        ValueError: the data do not fit (see `h2rec.data`), the loss takes no negatives, the run to resume has another
            config or log, or a file of it is damaged; ``resume`` and ``items_of`` both. Nothing has been written then.
        FloatingPointError: a loss or score is not finite.
        ChildProcessError: one of several processes was killed, or raised what is no built-in exception.
    """
    if resume and items_of is not None:
        raise ValueError("items_of: expected None for a run that is resumed, which has items of its own")
    run_dir, items_of = Path(run_dir), None if items_of is None else Path(items_of)
    config = _for_launcher(config.with_absolute_paths(), is_of_a_run=resume or items_of is not None)
    accelerator = _accelerator(config)
    if launched_world_size() is not None:
        with launched_group(accelerator):
            inputs = _start(config, run_dir, resume, items_of, accelerator) if is_first_process() else None
            torch.distributed.barrier()
            inputs = inputs or read_inputs(config, run_dir)
            _train_models(config, inputs, run_dir, accelerator)
            torch.distributed.barrier()
    elif config.devices == 1:
        inputs = _start(config, run_dir, resume, items_of, accelerator)
        _train_models(config, inputs, run_dir, accelerator)
    else:
        _start(config, run_dir, resume, items_of, accelerator)
        train_in_processes(_train_in_process, (config, run_dir, accelerator), config.devices, accelerator)
    if is_first_process() and config.hold_out:
        write_report(run_dir)
    return read_json(run_dir / "metrics.json")


def load_model(
    run_dir: str | os.PathLike[str], name: str
) -> tuple[SequentialModel, TrainConfig, ItemCatalog, SemanticIds]:
    """The best checkpoint of a model of a run, on the CPU and in eval mode, and what it was trained with.

    Returns:
        ``(model, config, catalog, sids)``.

    Raises:
        FileNotFoundError: no run in this directory, or the model has no checkpoint yet.
        ValueError: the run has no model of this name, or a file of it is damaged.
    """
    run_dir = Path(run_dir)
    check_trained(run_dir, (name,))
    config = TrainConfig.of_run(run_dir)
    sids = SemanticIds.load(run_dir / "sids.safetensors")
    model = _build(name, config, sids)
    _load_best_weights(model, name, config, run_dir / name)
    return model.eval(), config, read_catalog(run_dir / "items.parquet"), sids


def check_trained(run_dir: Path, names: Sequence[str]) -> None:
    """Refuses models that `load_model` cannot load, before one is."""
    config = TrainConfig.of_run(run_dir)
    for name in names:
        check_named(config, name)
        if not best_checkpoint(run_dir / name).exists():
            raise FileNotFoundError(f"{run_dir / name}: model {name!r} of this run has no checkpoint yet")


def check_named(config: TrainConfig, name: str) -> None:
    """Refuses the name of a model that the run has not."""
    if name not in config.models:
        raise ValueError(f"name: expected one of the run's models, {', '.join(config.models)}, got {name!r}")


def _for_launcher(config: TrainConfig, *, is_of_a_run: bool) -> TrainConfig:
    """With the number of processes that a launcher has started, if one has; as many users per step as a run had."""
    num_processes = launched_world_size()
    if num_processes in (None, config.devices):
        return config
    if is_of_a_run:
        return config.on_devices(num_processes)
    if config.devices != 1:
        raise ValueError(
            f"devices: expected {num_processes}, the processes that were started, got {config.devices}"
        )
    return dataclasses.replace(config, devices=num_processes)


def _start(
    config: TrainConfig, run_dir: Path, resume: bool, items_of: Path | None, accelerator: str
) -> Inputs:
    """Reads and checks all there is to read; then writes what a run begins with."""
    _check_directory(config, run_dir, resume)
    _finished_models(config, run_dir)  # that a result is damaged is told before the other models train
    begun = run_dir if resume else items_of
    inputs = read_inputs(config, begun, same_log=resume)
    if accelerator == "gpu" and config.devices > 1 and config.has_sparse_tables(inputs.sids.num_items):
        raise ValueError(
            "table_optimizer: expected 'adamw' with several GPUs, as NCCL averages no sparse gradients, "
            f"got {config.table_optimizer!r} for {inputs.sids.num_items:,} items"
        )
    loss = resolve_loss(config.loss, inputs.sids.num_items)
    if loss == "full_softmax" and config.num_negatives is not None and begun is None:
        raise ValueError(
            "num_negatives: expected none with the full softmax, which compares with the whole catalog, "
            f"got {config.num_negatives}; loss 'bce' and 'sampled_softmax' take them"
        )
    train_batches(config, inputs.split, world_size=config.devices)  # refuses before anything is written
    if not resume:
        _write_inputs(config, inputs, run_dir)
    if config.hold_out:
        _say_what_is_ranked(config, inputs)
    return inputs


def _say_what_is_ranked(config: TrainConfig, inputs: Inputs) -> None:
    if inputs.split.short_users:
        say(f"{inputs.split.short_users} users have fewer than three interactions and are not tested")
    repeated = repeated_share(inputs.split, "test", inputs.split.sample_users(_ASKED_USERS, config.seed))
    if config.mask_history and repeated >= _MANY_REPEATED:
        say(
            f"{repeated:.0%} of the test items are ones that their users had before; if such are to be recommended, "
            "train with --keep-history"
        )
    if inputs.eval_users is not None:
        say(f"Validation and test rank a sample of {len(inputs.eval_users):,} users")


def _accelerator(config: TrainConfig) -> str:
    available = torch.cuda.device_count()
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if available else "cpu"
    if accelerator == "gpu" and not available:
        raise ValueError("accelerator: expected 'cpu' or 'auto' where PyTorch sees no GPU, got 'gpu'")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    if accelerator == "gpu" and local > available:
        raise ValueError(f"devices: expected at most {available}, the GPUs that PyTorch sees, got {local}")
    return accelerator


def _check_directory(config: TrainConfig, run_dir: Path, resume: bool) -> None:
    if resume:
        saved = TrainConfig.of_run(run_dir)
        if config.difference(saved):
            raise ValueError(f"{run_dir}: the run has another config: {config.describe_difference(saved)}")
        return
    # A run that was killed before it had a config, which comes last, has done nothing yet.
    files = {run_dir / name for name in ("sids.safetensors", "items.parquet", "data.json")}
    nothing = {*files, *map(partial, files), partial(run_dir / "config.json")}
    if run_dir.exists() and not (run_dir.is_dir() and nothing.issuperset(run_dir.iterdir())):
        raise FileExistsError(f"{run_dir}: exists already; resume it, or name another directory")


def _write_inputs(config: TrainConfig, inputs: Inputs, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    inputs.sids.save(run_dir / "sids.safetensors")
    write_catalog(inputs.catalog, run_dir / "items.parquet")
    write_json(run_dir / "data.json", inputs.data)
    with replacing(run_dir / "config.json") as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


def _train_in_process(config: TrainConfig, run_dir: Path, accelerator: str) -> None:
    _train_models(config, read_inputs(config, run_dir), run_dir, accelerator)


def _train_models(config: TrainConfig, inputs: Inputs, run_dir: Path, accelerator: str) -> None:
    for name in config.models:
        folder = run_dir / name
        if (folder / "metrics.json").exists():
            say(f"{name}: finished before")
            continue
        _train_model(name, config, inputs, folder, accelerator)
        gc.collect()  # Lightning's objects hold each other, and the model: of two large ones there is room for one
    if is_first_process():
        _write_metrics(config, inputs, run_dir)


def _build(
    name: str, config: TrainConfig, sids: SemanticIds, content: Tensor | None = None
) -> SequentialModel:
    settings = config.model_settings(name)
    if config.has_sparse_tables(sids.num_items) and "sparse" in model_settings(name):
        settings["sparse"] = True
    return build_model(name, sids, content=content, **settings)


def _related_items(share: float, inputs: Inputs) -> RelatedItems | None:
    return RelatedItems(inputs.sids, inputs.split, share, inputs.content) if share else None


def _train_model(name: str, config: TrainConfig, inputs: Inputs, folder: Path, accelerator: str) -> None:
    torch.manual_seed(config.seed)
    model = _build(name, config, inputs.sids, inputs.content)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    module = Recommender(
        name,
        model,
        config,
        inputs.split,
        related_items=_related_items(config.smoothing_of(name), inputs),
        co_occurrence=inputs.co_occurrence,
        eval_users=inputs.eval_users,
    )
    record = EpochRecord(folder, config.patience if config.hold_out else None)
    say(f"{name}: {parameters:,} parameters, {module.loss_name} loss")

    local = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    progress = progress_callback()
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=local,
            num_nodes=config.devices // local,
            strategy="auto" if config.devices == 1 else "ddp",
            max_epochs=config.max_epochs,
            limit_train_batches=config.steps_per_epoch,
            limit_val_batches=None if config.hold_out else 0,
            logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
            callbacks=[record, progress],
            enable_progress_bar=isinstance(progress, ProgressBar),
            plugins=[WholeCheckpoints()],
            num_sanity_val_steps=0,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        last = last_checkpoint(folder)
        trainer.fit(module, ckpt_path=last if last.exists() else None)

    if config.hold_out:
        _load_best_weights(model, name, config, folder)
        model.to(trainer.strategy.root_device)
    ranks = {
        stage: rank_users(
            model,
            inputs.split,
            stage,
            negatives=negatives,
            mask_history=config.mask_history,
            users=inputs.eval_users,
            progress=sweep_progress(name, model.num_items),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        for stage, negatives in inputs.negatives.items()
    }
    if not is_first_process():
        return
    train_counts = inputs.split.train_counts()
    metrics = {stage: metrics_of(ranks[stage], train_counts) for stage in ranks}
    if config.hold_out:
        with replacing(folder / "ranks.npz") as temporary:
            np.savez_compressed(temporary, **ranks["test"]._asdict())
    write_json(
        folder / "metrics.json",
        {
            **metrics,
            "loss": module.loss_name,
            "epochs": len(record.rows),
            "best_epoch": record.best_epoch,
            "seconds": round(record.seconds, 3),
            "parameters": parameters,
        },
    )
    if config.hold_out:
        test = metrics["test"]["full"]["overall"]
        say(
            f"{name}: best epoch {record.best_epoch}, test NDCG@10 {test['NDCG@10']:.4f}, HR@10 {test['HR@10']:.4f}"
        )


def _finished_models(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Name -> ``metrics.json``, of the config's models that have one."""
    paths = {name: run_dir / name / "metrics.json" for name in config.models}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


def _write_metrics(config: TrainConfig, inputs: Inputs, run_dir: Path) -> None:
    ranking = {
        "history_masked": config.mask_history,
        "negatives": config.ranking_negatives,
        "seed": config.seed,
        "users": None if inputs.eval_users is None else len(inputs.eval_users),
    }
    write_json(
        run_dir / "metrics.json",
        {
            "models": _finished_models(config, run_dir),
            "sid_stats": dataclasses.asdict(inputs.sids.stats()),
            "data": {name: value for name, value in inputs.data.items() if not name.endswith("digest")},
            "ranking": ranking if config.hold_out else None,
        },
    )


def _load_best_weights(model: SequentialModel, name: str, config: TrainConfig, folder: Path) -> None:
    checkpoint = load_checkpoint(best_checkpoint(folder))
    check_origin(checkpoint, name, config)
    state = checkpoint["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})

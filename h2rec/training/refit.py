"""A model of a run trained again, on everything."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from h2rec.training.config import TrainConfig, main_model
from h2rec.training.files import read_json
from h2rec.training.run import check_named, train_run


def refit_run(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    name: str | None = None,
    *,
    devices: int | None = None,
) -> dict[str, Any]:
    """Trains a model of a finished run again, on all interactions, for as many epochs as were best on validation.

    The items and their semantic IDs are the run's; the log is read from where the run names it, as it is now, so it may
    have grown. ``output`` becomes a run of its own, with ``hold_out`` false: `load_model`, `h2rec.training.recommend`
    and `h2rec.training.export` take it, and `train_run` goes on with it if it was interrupted. Nothing is ranked.

    Args:
        run_dir: a directory that `train_run` wrote.
        output: a directory that does not exist, or is empty.
        name: of the model; None: ``h2rec``, or the run's last.
        devices: processes that share each step, see `TrainConfig.on_devices` and `train_run`; None: as in the run. A
            launcher's processes are all used.

    Returns:
        the content of ``metrics.json``.

    Raises:
        FileNotFoundError: no run in ``run_dir``, or the model has not finished training.
        ValueError: the run has no model of this name, the log has items that the run has not, or the content vectors
            have changed.
        Exception: as `train_run` raises them.
    """
    run_dir = Path(run_dir)
    config = TrainConfig.of_run(run_dir)
    name = main_model(config.models) if name is None else name
    check_named(config, name)
    path = run_dir / name / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{run_dir / name}: model {name!r} of this run has not finished training; resume the run"
        )
    epochs = read_json(path)["best_epoch"] + 1
    config = dataclasses.replace(config, models=(name,), hold_out=False, max_epochs=epochs)
    if devices is not None:
        config = config.on_devices(devices)
    return train_run(config, output, items_of=run_dir)

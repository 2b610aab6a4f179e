"""Checkpoints that are whole or not there, of the last and of the best epoch."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from h2rec._files import replacing
from h2rec.training.module import MONITOR

_COLUMNS = ("epoch", "train_loss", MONITOR, "valid_HR@10")


def best_checkpoint(folder: Path) -> Path:
    """Where the folder of a model has the weights of its best epoch."""
    return folder / "checkpoints" / "best.ckpt"


def last_checkpoint(folder: Path) -> Path:
    """Where the folder of a model has all that training goes on from."""
    return folder / "checkpoints" / "last.ckpt"


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, where its tensors are mapped; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive fails in as many ways as it has parts
        raise ValueError(
            f"{path}: not a whole checkpoint (truncated, damaged, or not written by training): "
            f"{str(error).splitlines()[0]}; remove the model's folder and resume the run to train it again"
        ) from error


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint to a temporary name and renames it; reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Given a name, torch.save would not say why it cannot write.
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return load_checkpoint(path)


class EpochRecord(Checkpoint):
    """Leaves on disk, after each epoch: a row of ``metrics.csv``, ``best.ckpt`` if it is the best, then ``last.ckpt``.

    ``last.ckpt`` comes last and holds this state too: whatever a killed run had written after it is written again, with
    the same content, by the run that goes on. (Lightning's own callback forgets the best score when the folder has
    moved, and its CSV logger starts a new file.)

    Stops training once ``patience`` epochs have not been better than the best; a run that goes on after that stops at
    once.

    Args:
        folder: of the model.
        patience: see `h2rec.training.TrainConfig`; None: there is no validation, and the last epoch is the best.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self.folder = folder
        self.patience = patience
        self.rows: list[dict[str, float]] = []
        self.best_epoch = -1
        self.best_score = -1.0
        self.seconds = 0.0
        self._started = 0.0

    @property
    def _is_over(self) -> bool:
        return (
            self.patience is not None
            and bool(self.rows)
            and len(self.rows) - 1 - self.best_epoch >= self.patience
        )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self._is_over

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.seconds += time.perf_counter() - self._started
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("train_", "valid_"))
        }
        self.rows.append({"epoch": trainer.current_epoch, **metrics})
        if self.patience is None:
            score, is_best = self.best_score, trainer.current_epoch + 1 == trainer.max_epochs
        else:
            score = metrics[MONITOR]
            is_best = score > self.best_score
        if is_best:
            self.best_epoch, self.best_score = trainer.current_epoch, score
        if trainer.is_global_zero:
            self._write_table()
        if is_best:
            trainer.save_checkpoint(best_checkpoint(self.folder), weights_only=True)
        trainer.save_checkpoint(last_checkpoint(self.folder))
        trainer.should_stop = trainer.should_stop or self._is_over

    def _write_table(self) -> None:
        names = self.rows[0].keys()
        columns = [*(name for name in _COLUMNS if name in names), *sorted(names - set(_COLUMNS))]
        with replacing(self.folder / "metrics.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]
        self.best_epoch = state_dict["best_epoch"]
        self.best_score = state_dict["best_score"]
        self.seconds = state_dict["seconds"]

"""What a training run tells the person who waits for it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from h2rec.training.module import MONITOR


@rank_zero_only
def say(text: str) -> None:
    """Prints a line, from one process."""
    print(text, flush=True)


class EpochLines(Callback):
    """One line per epoch, where a progress bar would fill a log file with its frames."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        line = f"{pl_module.name}: epoch {trainer.current_epoch}, loss {metrics['train_loss']:.4f}"
        if MONITOR in metrics:
            line += f", valid NDCG@10 {metrics[MONITOR]:.4f}, HR@10 {metrics['valid_HR@10']:.4f}"
        print(line, flush=True)


def progress_callback() -> Callback:
    """A progress bar on a terminal, lines elsewhere."""
    return RichProgressBar(refresh_rate=5) if sys.stdout.isatty() else EpochLines()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leaves out Lightning's banners, and its warnings about what is so on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Batches come ready-made, epochs are logged as a whole, every process has the metrics of all users, and
            # what Lightning calls is its own affair.
            for message in (
                ".*does not have many workers.*",
                ".*logging interval.*",
                ".*has `__len__` defined.*",
                ".*LeafSpec.*",
                ".*sync_dist=True.*",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Training and evaluating the models, all by the same rules.

`TrainConfig` is light; the rest is imported when it is asked for, because Lightning takes seconds.
`h2rec.training.recommend` and `h2rec.training.report` are modules of their own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from h2rec.training.config import TrainConfig

if TYPE_CHECKING:
    from h2rec.training.evaluation import Ranks, evaluate_model, rank_users
    from h2rec.training.inputs import read_split
    from h2rec.training.refit import refit_run
    from h2rec.training.run import load_model, train_run

_HOMES = {
    "Ranks": "evaluation",
    "evaluate_model": "evaluation",
    "load_model": "run",
    "rank_users": "evaluation",
    "read_split": "inputs",
    "refit_run": "refit",
    "train_run": "run",
}

__all__ = [
    "Ranks",
    "TrainConfig",
    "evaluate_model",
    "load_model",
    "rank_users",
    "read_split",
    "refit_run",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

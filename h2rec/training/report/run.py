"""What the report shows of a run, read from its directory."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2rec.training.files import read_json

BASELINE = "hash"
LABELS = {
    "hash": "Hash IDs only",
    "llminit": "Hash IDs from content",
    "semantic": "Semantic IDs only",
    "sum": "Hash + semantic, summed",
    "mean": "Hash + semantic, mean",
    "concat": "Hash + semantic, side by side",
    "h2rec": "H2Rec",
}


@dataclass(frozen=True)
class ReportedRun:
    """The files of a run directory, as plain Python values."""

    name: str
    metrics: dict[str, Any]  # metrics.json
    config: dict[str, Any]  # config.json
    curves: dict[str, dict[str, list[float]]]  # model -> column -> one value per epoch

    @property
    def models(self) -> list[str]:
        return list(self.metrics["models"])

    def label(self, model: str) -> str:
        return LABELS.get(model, model)

    def value(self, model: str, protocol: str, group: str, metric: str) -> float:
        """A test metric, NaN for a group of no users. ``group`` is overall, head, tail, or a band such as "1-9"."""
        groups = self.metrics["models"][model]["test"][protocol]
        value = (groups["bands"] | groups)[group][metric]
        return math.nan if value is None else float(value)

    def count(self, group: str) -> int:
        """Test users whose held-out item is in the group; the same for every model."""
        return int(self.value(self.models[0], "full", group, "count"))

    def bands(self) -> list[str]:
        return list(self.metrics["models"][self.models[0]]["test"]["full"]["bands"])

    def gain(self, model: str, protocol: str, group: str, metric: str) -> float:
        """Relative difference to the model on hash IDs only; NaN where there is nothing to compare with."""
        if model == BASELINE or BASELINE not in self.metrics["models"]:
            return math.nan
        base = self.value(BASELINE, protocol, group, metric)
        return self.value(model, protocol, group, metric) / base - 1 if base > 0 else math.nan


def read_run(run_dir: Path) -> ReportedRun:
    metrics_path = run_dir / "metrics.json"
    if not metrics_path.is_file():
        raise FileNotFoundError(f"{run_dir} has no metrics.json: no model of this run has been evaluated yet")
    metrics = read_json(metrics_path)
    if not isinstance(metrics.get("models"), dict) or not metrics["models"]:
        raise ValueError(f'{metrics_path} has no "models"')
    if "ranking" in metrics and metrics["ranking"] is None:
        raise ValueError(
            f"{run_dir}: nothing was held out of this run's training, so there is nothing to report"
        )
    curves = {model: _read_curves(run_dir / model / "metrics.csv") for model in metrics["models"]}
    return ReportedRun(run_dir.resolve().name, metrics, read_json(run_dir / "config.json"), curves)


def _read_curves(path: Path) -> dict[str, list[float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}

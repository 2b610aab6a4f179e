"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from h2rec.layers.granularity_fusion import MODES as FUSIONS
from h2rec.models import MODELS, model_settings
from h2rec.models.backbones import BACKBONES
from h2rec.models.h2rec import MIXINGS

# From so many items on nothing else is made that is as large as the table: its gradients are sparse, its optimizer
# keeps a number per row, and items are ranked in tiles. (A dense step of Adam on 500,000 x 64 moves 0.9 GB.)
LARGE_CATALOG = 500_000
_EVAL_USERS = 10_000
_H2REC_SMOOTHING = 0.3

LOSSES = ("auto", "full_softmax", "sampled_softmax", "bce")
DEFAULT_MODELS = ("hash", "semantic", "sum", "h2rec")
TABLE_OPTIMIZERS = ("auto", "adamw", "rowwise_adagrad")
ACCELERATORS = ("auto", "cpu", "gpu")
# How the authors of arXiv 2512.10388 ran it.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "num_heads": 1,
        "max_length": 200,
        "dropout": 0.5,
        "fusion": "mean",
        "mixing": "attention",
        "share_backbone": True,
        "alignment_weight": 0.1,
        "alignment_temperature": 0.5,
        "min_shared_codes": 4,
        "co_occurrence": True,
        "granularity_weight": 0.1,
        "loss": "bce",
        "target_smoothing": 0.0,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_epochs": 200,
        "patience": 20,
    },
}
PATHS = ("interactions", "sids", "items", "embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained, on what, and how; checks itself when made.

    Args:
        interactions: file of interactions (parquet, csv, tsv or RecBole ``.inter``).
        sids: semantic IDs as ``h2rec tokenize`` writes them.
        items: file of items; without one the item ids are the rows of the semantic IDs, 0 to num_items - 1.
        embeddings: content vectors ``[num_items, D]``; the hash tables of ``llminit``, ``sum``, ``mean``, ``concat``
            and ``h2rec`` start from them, and up to 50,000 items target smoothing takes those alike by them.
        user_column, item_column: names of the raw id columns (``item_column`` in both files).
        order_column: timestamp or position; ``None`` takes ``timestamp``, ``time`` or ``order`` if there is one, else
            the order in the file.
        title_column: column of ``items`` that names an item to a reader.
        models: which models to train, in this order, all by the same rules; `h2rec.models.build_model` lists them.
        backbone: of every model: ``"sasrec"``, ``"gru4rec"`` or ``"bert4rec"``.
        dim, num_layers, num_heads, dropout, max_length: size of every model; sequences keep their latest
            ``max_length`` items.
        fusion, mixing, share_backbone, alignment_weight, alignment_temperature, min_shared_codes,
            granularity_weight: of `h2rec.models.H2Rec`, which explains them.
        co_occurrence: items that occur near each other in training are positives of H2Rec's alignment.
        loss: ``"full_softmax"`` over the catalog, ``"sampled_softmax"``, ``"bce"`` (the paper's), or ``"auto"``:
            full up to `h2rec.training.losses.FULL_SOFTMAX_MAX_ITEMS` items, sampled beyond.
        num_negatives: per position for ``"bce"`` (default 1); shared by the whole batch for ``"sampled_softmax"``
            (default 1024); None with ``"full_softmax"``.
        target_smoothing: share of a target's weight in the loss that goes to items of its kind if it is of mean
            popularity; the rarer the more (`h2rec.training.related_items.RelatedItems`); None: 0.3 for ``h2rec``, 0
            for the others.
        batch_size: users per step and process.
        learning_rate, weight_decay: of AdamW.
        table_optimizer: of the hash table: ``"adamw"``, or ``"rowwise_adagrad"``, which updates the rows of the batch
            only and keeps one number for each (`h2rec.optim.RowwiseAdagrad`), or ``"auto"``: the latter for
            `LARGE_CATALOG` items or more.
        table_learning_rate: of ``"rowwise_adagrad"``.
        max_epochs: the most epochs that a model trains.
        steps_per_epoch: an epoch is at most so many batches, others each time; None: all users once.
        patience: epochs without a better validation NDCG@10 before a model stops; unused if nothing is held out.
        seed: of the starting weights, dropout, batch order and negatives.
        hold_out: keep the last two items of each user out of training, for validation and test; False: train on all
            for ``max_epochs`` epochs, and rank nobody, as `h2rec.training.refit_run` does.
        eval_users: validation and test rank a sample of so many users, drawn once by the seed; None: all, but 10,000
            where there are `LARGE_CATALOG` items or more.
        ranking_negatives: sampled negatives per user in evaluation.
        mask_history: leave a user's earlier items, but for the one looked for, out of the full ranking, by which
            training stops, as `h2rec.training.recommend.recommend` leaves them out.
        accelerator, devices: ``"auto"``, ``"cpu"`` or ``"gpu"``, and how many processes train together.

    Raises:
        ValueError, TypeError: a setting is out of range or of the wrong type; the message names it.
    """

    interactions: str
    sids: str
    items: str | None = None
    embeddings: str | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    order_column: str | None = None
    title_column: str | None = None

    models: tuple[str, ...] = DEFAULT_MODELS
    dim: int = 64
    backbone: str = "sasrec"
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.2
    max_length: int = 50
    fusion: str = "sum"
    mixing: str = "sum"
    share_backbone: bool = False
    alignment_weight: float = 0.0
    alignment_temperature: float = 0.5
    min_shared_codes: int | None = None
    co_occurrence: bool = True
    granularity_weight: float = 0.0

    loss: str = "auto"
    num_negatives: int | None = None
    target_smoothing: float | None = None
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    table_optimizer: str = "auto"
    table_learning_rate: float = 0.02
    max_epochs: int = 200
    steps_per_epoch: int | None = None
    patience: int = 10
    seed: int = 0

    hold_out: bool = True
    eval_users: int | None = None
    ranking_negatives: int = 100
    mask_history: bool = True

    accelerator: str = "auto"
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("interactions", "sids", "user_column", "item_column"):
            _check_text(name, getattr(self, name))
        for name in ("items", "embeddings", "order_column", "title_column"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))

        if not isinstance(self.models, (tuple, list)) or not all(isinstance(m, str) for m in self.models):
            raise TypeError(f"models: expected a sequence of names, got {self.models!r}")
        object.__setattr__(self, "models", tuple(self.models))
        if not self.models:
            raise ValueError(f"models: expected at least one of {_known(MODELS)}, got none")
        for model in self.models:
            _check_choice("models", model, MODELS)
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"models: each may be named once, got {', '.join(self.models)}")
        if "llminit" in self.models and self.embeddings is None:
            raise ValueError("embeddings: expected content vectors for 'llminit' to start from, got none")

        for name in (
            *("dim", "num_layers", "num_heads", "max_length", "batch_size"),
            *("max_epochs", "patience", "devices", "ranking_negatives"),
        ):
            _check_integer(name, getattr(self, name), minimum=1)
        _check_integer("seed", self.seed, minimum=0)
        for name in ("num_negatives", "min_shared_codes", "steps_per_epoch", "eval_users"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), minimum=1)
        if self.dim % self.num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {self.num_heads}, got {self.dim}")

        for name in ("learning_rate", "table_learning_rate", "alignment_temperature"):
            self._check_number(name, "above 0.0", lambda value: value > 0)
        for name in ("weight_decay", "alignment_weight", "granularity_weight"):
            self._check_number(name, "at least 0.0", lambda value: value >= 0)
        for name in ("dropout",) if self.target_smoothing is None else ("dropout", "target_smoothing"):
            self._check_number(name, "at least 0.0 and below 1.0", lambda value: 0 <= value < 1)

        _check_choice("loss", self.loss, LOSSES)
        _check_choice("table_optimizer", self.table_optimizer, TABLE_OPTIMIZERS)
        _check_choice("accelerator", self.accelerator, ACCELERATORS)
        _check_choice("backbone", self.backbone, BACKBONES)
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_choice("mixing", self.mixing, MIXINGS)
        if self.granularity_weight > 0 and self.mixing == "sum":
            raise ValueError(
                "granularity_weight: expected 0.0 with mixing 'sum', which has no gate that could weigh the levels, "
                f"got {self.granularity_weight}"
            )
        for name in ("share_backbone", "co_occurrence", "hold_out", "mask_history"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected true or false, got {getattr(self, name)!r}")

    def _check_number(self, name: str, expected: str, is_inside: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not (math.isfinite(value) and is_inside(value)):
            raise ValueError(f"{name}: expected a number {expected}, got {value!r}")
        object.__setattr__(self, name, float(value))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Makes a config from plain values, as JSON gives them; an unknown option is a ValueError."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(f"unknown option {name!r}; {hint}options are {', '.join(names)}")
        missing = [name for name in ("interactions", "sids") if name not in values]
        if missing:
            raise ValueError(f"missing option {' and '.join(map(repr, missing))}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a JSON object of options, got {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads a JSON file; errors name the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from error

    @classmethod
    def of_run(cls, run_dir: str | Path) -> TrainConfig:
        """Reads the config of a run directory.

        Raises:
            FileNotFoundError: there is no run.
        """
        path = Path(run_dir) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{run_dir}: no run here (it has no config.json)")
        return cls.load(path)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def with_absolute_paths(self) -> TrainConfig:
        """The same config with its paths made absolute, so that it means the same from another folder."""
        paths = {name: getattr(self, name) for name in PATHS}
        return dataclasses.replace(
            self, **{name: str(Path(path).absolute()) for name, path in paths.items() if path is not None}
        )

    def on_devices(self, devices: int) -> TrainConfig:
        """The same training with each step shared by another number of processes.

        Raises:
            ValueError: the users of a step, ``devices * batch_size``, cannot be shared evenly.
        """
        _check_integer("devices", devices, minimum=1)
        users = self.devices * self.batch_size
        if users % devices:
            raise ValueError(f"devices: expected a divisor of {users}, the users of a step, got {devices}")
        return dataclasses.replace(self, devices=devices, batch_size=users // devices)

    def difference(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Option -> (own value, the other's value), for every option that differs.

        How many processes share a step makes no difference, as long as it has the same number of users.
        """
        if other.devices * other.batch_size == self.devices * self.batch_size:
            other = dataclasses.replace(other, devices=self.devices, batch_size=self.batch_size)
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def describe_difference(self, other: TrainConfig) -> str:
        """What differs, for a message: ``learning_rate is 0.001, not 0.01; ...``."""
        return "; ".join(
            f"{name} is {own!r}, not {its!r}" for name, (own, its) in self.difference(other).items()
        )

    def has_sparse_tables(self, num_items: int) -> bool:
        """Whether hash tables get sparse gradients, for `h2rec.optim.RowwiseAdagrad`."""
        if self.table_optimizer == "auto":
            return is_large(num_items)
        return self.table_optimizer == "rowwise_adagrad"

    def smoothing_of(self, model: str) -> float:
        """The target smoothing of one of the models."""
        if self.target_smoothing is None:
            return _H2REC_SMOOTHING if model == "h2rec" else 0.0
        return self.target_smoothing

    def num_eval_users(self, num_items: int) -> int | None:
        """How many users are ranked at most; None: all."""
        return _EVAL_USERS if self.eval_users is None and is_large(num_items) else self.eval_users

    def model_settings(self, model: str) -> dict[str, Any]:
        """The settings that `h2rec.models.build_model` takes for one of the models."""
        return {name: getattr(self, name) for name in model_settings(model) if hasattr(self, name)}


def main_model(models: Sequence[str]) -> str:
    """Which of a run's models is meant where none is named."""
    return "h2rec" if "h2rec" in models else models[-1]


def is_large(num_items: int) -> bool:
    """See `LARGE_CATALOG`."""
    return num_items >= LARGE_CATALOG


def _known(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {value!r}")
    if not value:
        raise ValueError(f"{name}: expected text, got an empty string")


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {_known(choices)}, got {value!r}")


def _check_integer(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value}")

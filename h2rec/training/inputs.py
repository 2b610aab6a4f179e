"""What a run trains on, read and checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from h2rec._files import replacing
from h2rec.data import (
    CoOccurrence,
    ItemCatalog,
    Split,
    co_occurrence,
    leave_one_out,
    nothing_held_out,
    read_interactions,
    read_items,
    sample_negatives,
)
from h2rec.data.tables import Table
from h2rec.ops._checks import check_finite_rows
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers import open_vectors
from h2rec.tokenizers.checkpoint import digest
from h2rec.training.config import TrainConfig
from h2rec.training.files import read_json


class Inputs(NamedTuple):
    """Everything that training and evaluation read."""

    split: Split
    sids: SemanticIds
    content: (
        Tensor | None
    )  # [num_items, D0], in the file's dtype; an .npy is mapped, copied where it is written
    co_occurrence: CoOccurrence | None  # of the training part
    eval_users: np.ndarray | None  # those who are ranked; None: all
    negatives: dict[str, np.ndarray]  # of each stage that is ranked, [num_users or len(eval_users), n]
    data: dict[str, Any]  # how large the log is, and digests, as data.json keeps them

    @property
    def catalog(self) -> ItemCatalog:
        return self.split.log.catalog


def read_split(config: TrainConfig, num_items: int, catalog: ItemCatalog | None = None) -> Split:
    """The log as the config names it. Without a file of items, the raw ids are 0 to ``num_items - 1``.

    Args:
        catalog: of the run that is gone on with or was trained (`h2rec.training.load_model`): its rows are those of the
            model's tables, in whatever order the file of items is now. None: as the file of items is.

    Raises:
        ValueError, FileNotFoundError: see `h2rec.data`; or items that are not ``num_items`` (those of the SIDs).
    """
    if config.items is None:
        catalog = None
    elif catalog is None:
        catalog = read_items(config.items, item=config.item_column, title=config.title_column)
        if catalog.num_items != num_items:
            raise ValueError(
                f"sids: expected semantic IDs of the {catalog.num_items} items of {config.items}, "
                f"got {num_items} of {config.sids}"
            )
    log = read_interactions(
        config.interactions,
        user=config.user_column,
        item=config.item_column,
        order=config.order_column,
        catalog=catalog,
        num_items=num_items,
    )
    return leave_one_out(log) if config.hold_out else nothing_held_out(log)


def read_inputs(config: TrainConfig, run_dir: Path | None, *, same_log: bool = True) -> Inputs:
    """Reads what the config names; semantic IDs and catalog from a run, where one is given.

    Args:
        run_dir: a run that has begun: the one to go on with, or to refit; None: neither.
        same_log: refuse a log that is not the one that the run began with.

    Raises:
        ValueError, FileNotFoundError: see `h2rec.data`; the data do not fit, or are not those that the run began with.
    """
    sids_path = Path(config.sids) if run_dir is None else run_dir / "sids.safetensors"
    sids = SemanticIds.load(sids_path)
    if config.min_shared_codes is not None and config.min_shared_codes > sids.num_levels:
        raise ValueError(
            f"min_shared_codes: expected at most {sids.num_levels}, the levels of {sids_path}, "
            f"got {config.min_shared_codes}"
        )
    catalog = None if run_dir is None else read_catalog(run_dir / "items.parquet")
    split = read_split(config, sids.num_items, catalog)
    began = {} if run_dir is None else _kept_data(run_dir)
    if same_log and (change := _difference(began, split)):
        raise ValueError(
            f"interactions: expected those that the run began with, {change} ({config.interactions})"
        )
    data = _describe_log(split)
    if config.hold_out and not (split.test_targets >= 0).any():
        raise ValueError(
            f"interactions: expected at least one user with three or more, got none in {config.interactions}"
        )
    content = None
    if config.embeddings is not None:
        content = _read_content(config.embeddings, sids.num_items)
        data["vectors_digest"] = digest([content])
        if began.get("vectors_digest", data["vectors_digest"]) != data["vectors_digest"]:
            raise ValueError(
                f"embeddings: expected the vectors that the run began with, got others ({config.embeddings})"
            )
    is_aligned = "h2rec" in config.models and config.alignment_weight > 0
    pairs = co_occurrence(split) if is_aligned and config.co_occurrence else None
    users = eval_users(config, split)
    return Inputs(split, sids, content, pairs, users, _ranking_negatives(config, split, users), data)


def _describe_log(split: Split) -> dict[str, Any]:
    log = split.log
    return {
        "users": log.num_users,
        "items": log.num_items,
        "interactions": log.num_interactions,
        "short_users": split.short_users,
        "log_digest": digest([log.offsets, log.items]),
    }


def log_change(split: Split, run_dir: Path) -> str | None:
    """What a log is instead of the one that a run began with; None: nothing else, or nothing is known of it."""
    return _difference(_kept_data(run_dir), split)


def _difference(began: dict[str, Any], split: Split) -> str | None:
    now = _describe_log(split)
    if not began or began["log_digest"] == now["log_digest"]:
        return None
    sizes = (f"{d['interactions']:,} interactions of {d['users']:,} users" for d in (began, now))
    return "{}, got {} that are not the same".format(*sizes)


def _kept_data(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "data.json"
    return read_json(path) if path.exists() else {}


def _read_content(path: str, num_items: int) -> Tensor:
    vectors = open_vectors(path)
    if len(vectors) != num_items:
        raise ValueError(
            f"{path}: expected {num_items} rows, one per item of the catalog, got {len(vectors)}"
        )
    is_npy = vectors.path.suffix.lower() == ".npy"
    content = torch.from_numpy(np.load(path, mmap_mode="c")) if is_npy else torch.cat(list(vectors()))
    check_finite_rows(path, content)
    return content


def eval_users(config: TrainConfig, split: Split) -> np.ndarray | None:
    """The users that a config ranks in validation and test; None: all."""
    count = config.num_eval_users(split.num_items)
    return None if count is None else split.sample_users(count, config.seed)


def _ranking_negatives(config: TrainConfig, split: Split, users: np.ndarray | None) -> dict[str, np.ndarray]:
    try:
        return {
            stage: sample_negatives(split, stage, config.ranking_negatives, config.seed, users=users)
            for stage in (("test", "valid") if config.hold_out else ())
        }
    except ValueError as error:
        # By the name that the setting has here.
        raise ValueError(str(error).replace("num_negatives", "ranking_negatives")) from error


def write_catalog(catalog: ItemCatalog, path: Path) -> None:
    columns = {"item_id": catalog.ids}
    if catalog.titles is not None:
        columns["title"] = pl.Series(catalog.titles, dtype=pl.String)
    with replacing(path) as temporary:
        try:
            pl.DataFrame(columns).write_parquet(temporary)
        except pl.exceptions.PolarsError as error:
            raise OSError(str(error)) from error


def read_catalog(path: Path) -> ItemCatalog:
    """The inverse of `write_catalog`."""
    return read_items(path, title="title" if "title" in Table(path).columns else None)

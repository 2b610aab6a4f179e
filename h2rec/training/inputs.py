"""What a run trains on, read and checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
    read_interactions,
    read_items,
    sample_negatives,
)
from h2rec.ops._checks import check_finite_rows
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers import open_vectors
from h2rec.training.config import TrainConfig


class Inputs(NamedTuple):
    """Everything that training and evaluation read."""

    split: Split
    sids: SemanticIds
    content: (
        Tensor | None
    )  # [num_items, D0], in the file's dtype; an .npy is mapped, copied where it is written
    co_occurrence: CoOccurrence | None  # of the training part
    eval_users: np.ndarray | None  # those who are ranked; None: all
    negatives: dict[str, np.ndarray]  # of each stage, [num_users or len(eval_users), n]

    @property
    def catalog(self) -> ItemCatalog:
        return self.split.log.catalog


def read_split(config: TrainConfig, num_items: int) -> Split:
    """The log as the config names it. Without a file of items, the raw ids are 0 to ``num_items - 1``.

    Raises:
        ValueError, FileNotFoundError: see `h2rec.data`; or items that are not ``num_items`` (those of the SIDs).
    """
    catalog = None
    if config.items is not None:
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
    return leave_one_out(log)


def read_inputs(config: TrainConfig, sids_path: Path) -> Inputs:
    """Reads all that the config names, the semantic IDs from ``sids_path``."""
    sids = SemanticIds.load(sids_path)
    if config.min_shared_codes is not None and config.min_shared_codes > sids.num_levels:
        raise ValueError(
            f"min_shared_codes: expected at most {sids.num_levels}, the levels of {sids_path}, "
            f"got {config.min_shared_codes}"
        )
    split = read_split(config, sids.num_items)
    for stage in ("valid", "test"):
        if not (split.targets(stage) >= 0).any():
            raise ValueError(
                f"interactions: expected at least one user with three or more, got none in {config.interactions}"
            )
    content = None
    if config.embeddings is not None:
        content = _read_content(config.embeddings, sids.num_items)
    is_aligned = "h2rec" in config.models and config.alignment_weight > 0
    pairs = co_occurrence(split) if is_aligned and config.co_occurrence else None
    users = eval_users(config, split)
    return Inputs(split, sids, content, pairs, users, _ranking_negatives(config, split, users))


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
            for stage in ("valid", "test")
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
    has_titles = "title" in pl.read_parquet_schema(path)
    return read_items(path, title="title" if has_titles else None)

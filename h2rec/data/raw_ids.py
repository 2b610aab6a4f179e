"""Ids as they stand in files: one form for all of them, and looking them up."""

from __future__ import annotations

import numpy as np
import polars as pl

_CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_SHOWN = 5


def normalise_ids(ids: pl.Series, where: str) -> pl.Series:
    """Bring ids to Int64, UInt64 (only where Int64 is too small) or String.

    Strings become integers only if every one is written as an integer would be (no leading zeros), so that an
    id column means the same in parquet and in text files, and ``"007"`` and ``"7"`` stay two ids. ``where``
    begins the message of every error.
    """
    if nulls := ids.null_count():
        raise ValueError(
            f"{where}: {nulls} of {len(ids)} ids are null, the first in row {ids.is_null().arg_max()}"
        )
    if isinstance(ids.dtype, pl.Categorical | pl.Enum):
        ids = ids.cast(pl.String)
    if ids.dtype == pl.String:
        if not ids.str.contains(_CANONICAL_INTEGER).all():
            return ids
        integers = ids.cast(pl.Int64, strict=False)
        return integers if integers.null_count() == 0 else ids
    if ids.dtype.is_integer():
        integers = ids.cast(pl.Int64, strict=False)
        if integers.null_count() == 0:
            return integers
        if ids.dtype == pl.UInt64:
            return ids
    raise ValueError(f"{where}: expected integers of up to 64 bits or strings, got {ids.dtype}")


def check_distinct(ids: pl.Series, where: str) -> None:
    """Refuse a catalog that names an item twice."""
    repeated = ids.filter(ids.is_duplicated())
    if len(repeated):
        raise ValueError(f"{where}: expected one row per item, got several for {first_few(repeated)}")


def find_ids(known: pl.Series, wanted: pl.Series) -> np.ndarray:
    """Position of each of ``wanted`` in ``known`` (distinct ids), -1 where it is not there: int64 ``[len(wanted)]``.

    Both have been through `normalise_ids`, but may have come out differently: a log that happens to hold the
    integers among the string ids of a catalog is matched as text.
    """
    if known.dtype == pl.String:
        wanted = wanted.cast(pl.String)
    elif wanted.dtype == pl.String:
        canonical = wanted.str.contains(_CANONICAL_INTEGER)
        wanted = wanted.to_frame("id").select(pl.when(canonical).then(pl.col("id")))["id"]
    wanted = wanted.cast(known.dtype, strict=False)
    rows = pl.DataFrame({"id": known, "row": pl.arange(len(known), eager=True, dtype=pl.Int64)})
    found = pl.DataFrame({"id": wanted}).join(rows, on="id", how="left", maintain_order="left")
    return found["row"].fill_null(-1).to_numpy()


def first_few(ids: pl.Series) -> str:
    """The first distinct ids, as text for a message."""
    distinct = ids.unique(maintain_order=True)
    shown = ", ".join(repr(value) for value in distinct.head(_SHOWN))
    return shown if len(distinct) <= _SHOWN else f"{shown}, ... ({len(distinct)} in all)"

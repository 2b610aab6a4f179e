"""The interaction log: who had which items, in which order."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import polars as pl

from h2rec.data.items import ItemCatalog
from h2rec.data.raw_ids import find_ids, first_few, normalise_ids
from h2rec.data.tables import Table

_ORDER_COLUMNS = ("timestamp", "time", "order")


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """Every user's items, oldest first, laid end to end.

    Attributes:
        users: raw user ids, ascending, without repeats ``[U]``. Row u is user id u everywhere else.
        catalog: the items.
        offsets: int64 ``[U + 1]``; user u had ``items[offsets[u]:offsets[u + 1]]``.
        items: item ids, int64 ``[E]``.

    Raises:
        ValueError: offsets or items that do not fit each other, the users or the catalog.
    """

    users: pl.Series
    catalog: ItemCatalog
    offsets: np.ndarray
    items: np.ndarray

    def __post_init__(self) -> None:
        for name in ("offsets", "items"):
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"{name}: expected integers [n], got {array.dtype} {list(array.shape)}")
            object.__setattr__(self, name, array.astype(np.int64, copy=False))
        ends_fit = len(self.offsets) == len(self.users) + 1 and self.offsets[[0, -1]].tolist() == [
            0,
            len(self.items),
        ]
        if not ends_fit or (np.diff(self.offsets) < 0).any():
            raise ValueError(
                f"offsets: expected {len(self.users) + 1} ascending numbers from 0 to {len(self.items)}, "
                f"got {len(self.offsets)} that begin {self.offsets[:3].tolist()} and end {self.offsets[-3:].tolist()}"
            )
        if len(self.items) and not 0 <= self.items.min() <= self.items.max() < self.num_items:
            raise ValueError(
                f"items: expected ids in [0, {self.num_items}), got {self.items.min()} to {self.items.max()}"
            )

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return self.catalog.num_items

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    def index_of_user(self, raw_id: int | str) -> int:
        """Row of a raw user id; an integer written as text is found as well. ValueError if nobody has it."""
        row = find_ids(self.users, normalise_ids(pl.Series([raw_id]), "raw_id"))[0]
        if row < 0:
            raise ValueError(f"no user {raw_id!r} among the {self.num_users} users of the log")
        return int(row)


def read_interactions(
    path: str | os.PathLike[str],
    *,
    user: str = "user_id",
    item: str = "item_id",
    order: str | None = None,
    catalog: ItemCatalog | None = None,
    num_items: int | None = None,
) -> InteractionLog:
    """Read a log from ``.parquet``, ``.csv``, ``.tsv`` or RecBole's ``.inter``, one interaction per row.

    Rows are sorted by user and then by ``order``; ties stay in file order. A repeated interaction stays.

    Args:
        path: the file.
        user, item: columns of the ids (integers or strings).
        order: column with a time or a position, ascending. Default: the first of ``timestamp``, ``time``,
            ``order`` that the file has, else the order of its rows.
        catalog: the items, where there is a file of them.
        num_items: without a catalog, says that the raw ids are the item ids, 0 to ``num_items - 1``. Given
            neither, the catalog is the items of the log by ascending raw id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an extension that is not known, an empty or damaged file, a missing column, null ids, an
            item that is not in the catalog or not below ``num_items``, an ``order`` that cannot be put in
            order.
    """
    if catalog is not None and num_items not in (None, catalog.num_items):
        raise ValueError(
            f"num_items: expected {catalog.num_items} as in the catalog, or None, got {num_items}"
        )
    table = Table(path)
    if order is None:
        order = next((name for name in _ORDER_COLUMNS if name in table.columns), None)
    frame = table.select({"user": user, "item": item} | ({} if order is None else {"order": order}))

    users = normalise_ids(frame["user"], f"{path}: column {user!r}")
    where = f"{path}: column {item!r}"
    raw_items = normalise_ids(frame["item"], where)
    if catalog is None:
        catalog = _catalog_of(raw_items, num_items, where)
    items = find_ids(catalog.ids, raw_items)
    if (items < 0).any():
        unknown = first_few(raw_items.filter(pl.Series(items < 0)))
        raise ValueError(f"{where}: items without a row in the catalog of {catalog.num_items}: {unknown}")

    columns = {"user": users, "item": pl.Series(items)}
    if order is not None:
        columns["order"] = _sortable(frame["order"], f"{path}: column {order!r}")
    keys = [name for name in columns if name != "item"]
    sequences = pl.DataFrame(columns).sort(keys, maintain_order=True)
    runs = sequences["user"].rle().struct.unnest()
    offsets = np.concatenate([[0], np.cumsum(runs["len"].to_numpy(), dtype=np.int64)])
    return InteractionLog(runs["value"].alias("user"), catalog, offsets, sequences["item"].to_numpy())


def _catalog_of(raw_items: pl.Series, num_items: int | None, where: str) -> ItemCatalog:
    if num_items is None:
        return ItemCatalog(raw_items.unique().sort())
    if num_items < 1:
        raise ValueError(f"num_items: expected at least 1, got {num_items}")
    if not raw_items.dtype.is_integer():
        raise ValueError(
            f"{where}: without a file of items the ids must be row numbers, integers in [0, {num_items}), "
            f"got {raw_items[0]!r}"
        )
    return ItemCatalog(pl.arange(num_items, eager=True, dtype=pl.Int64))


def _sortable(column: pl.Series, where: str) -> pl.Series:
    """The order column as numbers or times, without gaps."""
    if nulls := column.null_count():
        raise ValueError(f"{where}: {nulls} of {len(column)} rows have no value to order by")
    if column.dtype == pl.String:
        column = _parsed(column, where)
    if column.dtype.is_float():
        if nans := int(column.is_nan().sum()):
            raise ValueError(f"{where}: {nans} of {len(column)} rows are NaN, which has no place in an order")
    elif not (column.dtype.is_integer() or column.dtype.is_temporal()):
        raise ValueError(f"{where}: expected a number or a time to order by, got {column.dtype}")
    return column


def _parsed(text: pl.Series, where: str) -> pl.Series:
    # Integers before floats: nanoseconds since 1970 lose their last digits as a float.
    for dtype in (pl.Int64, pl.Float64):
        numbers = text.cast(dtype, strict=False)
        if numbers.null_count() == 0:
            return numbers
    try:
        return text.str.to_datetime()
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{where}: expected a number or a time to order by, got {text[0]!r}") from error

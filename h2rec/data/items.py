"""The catalog: which raw id stands in which row, and what the items are called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from h2rec.data.raw_ids import check_distinct, find_ids, first_few, normalise_ids
from h2rec.data.tables import Table


@dataclass(frozen=True, eq=False)
class ItemCatalog:
    """Items in row order. Row r is item id r everywhere else: in logs, embeddings, codes and scores.

    Attributes:
        ids: raw ids, distinct: Int64, UInt64 or String.
        titles: one per row, or None.
        texts: what is embedded, one per row and ``""`` where there is none, or None.

    Raises:
        ValueError: no items, null or repeated ids, ids that are neither integers nor strings, a list of
            another length.
    """

    ids: pl.Series
    titles: list[str] | None = None
    texts: list[str] | None = None

    def __post_init__(self) -> None:
        if len(self.ids) == 0:
            raise ValueError("ids: expected at least one item, got none")
        object.__setattr__(self, "ids", normalise_ids(self.ids, "ids"))
        check_distinct(self.ids, "ids")
        for name in ("titles", "texts"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"{name}: expected {len(self.ids)}, one per item, got {len(values)}")

    @property
    def num_items(self) -> int:
        return len(self.ids)

    def index_of(self, raw_ids: pl.Series | np.ndarray | Iterable[int | str]) -> np.ndarray:
        """Rows of raw ids: int64 ``[len(raw_ids)]``. Integers written as text are found as well.

        Raises:
            ValueError: ids that are not in the catalog; names the first few.
        """
        raw = raw_ids if isinstance(raw_ids, pl.Series) else _as_series(raw_ids)
        if len(raw) == 0:
            return np.empty(0, dtype=np.int64)
        raw = normalise_ids(raw, "raw_ids")
        rows = find_ids(self.ids, raw)
        if (rows < 0).any():
            unknown = first_few(raw.filter(pl.Series(rows < 0)))
            raise ValueError(f"not among the {self.num_items} items of the catalog: {unknown}")
        return rows


def read_items(
    path: str | os.PathLike[str],
    *,
    item: str = "item_id",
    title: str | None = None,
    text: str | Sequence[str] | None = None,
) -> ItemCatalog:
    """Read a catalog from ``.parquet``, ``.csv``, ``.tsv`` or RecBole's ``.item``.

    Args:
        path: the file; its row order is the order of the items.
        item: column of the item ids (integers or strings).
        title: column of what a person calls the item; where it is empty the id stands in.
        text: column of what is to be embedded, or several, which are joined by ``". "``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an extension that is not known, an empty or damaged file, a missing column, null or
            repeated ids.
    """
    table = Table(path)
    texts = [text] if isinstance(text, str) else list(text or ())
    columns = {"item": item, "title": title, **{f"text[{i}]": column for i, column in enumerate(texts)}}
    frame = table.select({argument: column for argument, column in columns.items() if column is not None})
    where = f"{path}: column {item!r}"
    ids = normalise_ids(frame["item"], where)
    check_distinct(ids, where)
    titles = None if title is None else _titles(frame["title"], ids, f"{path}: column {title!r}")
    parts = [_as_text(frame[f"text[{i}]"], f"{path}: column {column!r}") for i, column in enumerate(texts)]
    return ItemCatalog(ids, titles, _joined(parts) if parts else None)


def _as_series(values: Iterable[int | str]) -> pl.Series:
    try:
        return pl.Series(values if isinstance(values, np.ndarray) else list(values))
    except TypeError as error:
        raise ValueError(f"raw_ids: expected integers or strings, all of one kind: {error}") from error


def _titles(column: pl.Series, ids: pl.Series, where: str) -> list[str]:
    titles = _as_text(column, where)
    return titles.zip_with(titles != "", ids.cast(pl.String)).to_list()


def _joined(parts: list[pl.Series]) -> list[str]:
    frame = pl.DataFrame({str(i): part.replace("", None) for i, part in enumerate(parts)})
    return frame.select(pl.concat_str(pl.all(), separator=". ", ignore_nulls=True)).to_series().to_list()


def _as_text(values: pl.Series, where: str) -> pl.Series:
    if not (values.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null) or values.dtype.is_numeric()):
        raise ValueError(f"{where}: expected text or numbers, got {values.dtype}")
    return values.cast(pl.String).fill_null("").str.strip_chars()

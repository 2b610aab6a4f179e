"""Named columns of a table file: parquet, csv, tsv, and RecBole's .inter and .item."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

_TEXT_FORMATS = {  # extension -> separator, quote character
    ".csv": (",", '"'),
    ".tsv": ("\t", '"'),
    ".inter": ("\t", None),
    ".item": ("\t", None),
}
_RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")


class Table:
    """A table file whose header has been read; ``select`` reads the columns that are wanted.

    Columns of text files come as strings (an empty field is null), so that an id such as ``007`` keeps its
    zeros. RecBole headers ``name:type`` are known by ``name``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _check_file(self.path)
        with _reading(self.path):
            self._frame = _scan(self.path)
            self.columns = self._frame.collect_schema().names()

    def select(self, columns: Mapping[str, str]) -> pl.DataFrame:
        """Read ``{argument: column}`` into a frame whose columns are named by the argument."""
        wanted = {argument: self._resolve(argument, column) for argument, column in columns.items()}
        with _reading(self.path):
            frame = self._frame.select(pl.col(column).alias(argument) for argument, column in wanted.items())
            frame = frame.collect()
        if frame.height == 0:
            raise ValueError(f"{self.path}: expected rows, got a header with none below it")
        return frame

    def _resolve(self, argument: str, column: str) -> str:
        if column in self.columns:
            return column
        name = _without_recbole_type(column)
        if _is_recbole(self.path) and name in self.columns:
            return name
        there = ", ".join(self.columns)
        raise ValueError(f"{self.path}: no column {column!r} (argument {argument}); its columns are: {there}")


def _check_file(path: Path) -> None:
    known = (".parquet", *_TEXT_FORMATS)
    if path.suffix.lower() not in known:
        raise ValueError(f"{path}: expected one of {', '.join(known)}, got the extension {path.suffix!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got a directory")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")


def _scan(path: Path) -> pl.LazyFrame:
    if path.suffix.lower() == ".parquet":
        return pl.scan_parquet(path, glob=False)
    separator, quote = _TEXT_FORMATS[path.suffix.lower()]
    frame = pl.scan_csv(path, separator=separator, quote_char=quote, infer_schema=False, glob=False)
    if not _is_recbole(path):
        return frame
    return frame.rename({name: _without_recbole_type(name) for name in frame.collect_schema().names()})


def _is_recbole(path: Path) -> bool:
    return path.suffix.lower() in (".inter", ".item")


def _without_recbole_type(name: str) -> str:
    stem, _, kind = name.rpartition(":")
    return stem if stem and kind in _RECBOLE_TYPES else name


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).split("\n", 1)[0]  # polars goes on with advice about its own options
        raise ValueError(f"{path}: cannot be read as {path.suffix.lower()[1:]}: {reason}") from error

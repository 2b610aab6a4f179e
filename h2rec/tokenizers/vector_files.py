"""Content vectors in files of any size, as batches: one batch is in memory, the file is not mapped."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_BATCH_BYTES = 4 << 20
# Of a slice of a parquet file, in fp32: small ones cost nearly as much as large ones.
_SLICE_BYTES = 32 << 20
_SAFETENSORS_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class VectorFile:
    """The vectors of a file, to be given wherever vectors are wanted: each call reads them anew.

    Attributes:
        path, shape: the file and its ``(N, D)``.
        version: size and time of change, by which a file that changes meanwhile is noticed.
    """

    path: Path
    shape: tuple[int, int]
    version: tuple[int, int]
    _read: Callable[[], Iterator[Tensor]]

    def __len__(self) -> int:
        return self.shape[0]

    def fingerprint(self) -> list[object]:
        """What tells this file, as it is now, from others."""
        return [str(self.path.resolve()), *self.shape, *self.version]

    def __call__(self) -> Iterator[Tensor]:
        rows, batches = 0, self._read()
        self._check_version()
        while (batch := next(batches, None)) is not None:
            self._check_version()
            rows += len(batch)
            yield batch
            self._check_version()  # before more is read: polars aborts on a file that got shorter
        if rows != len(self):
            raise ValueError(f"{self.path}: expected {len(self)} rows, but {rows} could be read")

    def _check_version(self) -> None:
        if _version(self.path) != self.version:
            raise ValueError(f"{self.path}: the file changed while it was being read")


def open_vectors(path: str | os.PathLike[str], *, column: str | None = None) -> VectorFile:
    """Opens ``.npy``, ``.safetensors`` (one tensor, or one named ``embeddings``) or ``.parquet`` for streaming.

    Args:
        column: of a parquet file, with a list of D numbers in each row; not needed if there is only one such column.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another extension, a damaged or truncated file, or content that is no matrix of floating point.
            While reading: the file changed.
        ImportError: parquet needs polars (``pip install h2rec[train]``).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".safetensors", ".parquet"):
        raise ValueError(
            f"{path}: expected one of .npy, .safetensors, .parquet, got the extension {path.suffix!r}"
        )
    if column is not None and suffix != ".parquet":
        raise ValueError(f"column is for parquet files, got {column!r} and {path}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    version = _version(path)
    if suffix == ".parquet":
        shape, read = _parquet(path, column)
    else:
        shape, dtype, offset = (_npy_layout if suffix == ".npy" else _safetensors_layout)(path)
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"{path}: expected a matrix [items, dimensions], got shape {list(shape)}")
        needed = offset + math.prod(shape) * dtype.itemsize
        if version[0] < needed:
            raise ValueError(
                f"{path}: truncated: {needed} bytes are announced, but only {version[0]} are there"
            )

        def read() -> Iterator[Tensor]:
            return _raw_rows(path, shape, dtype, offset)

    return VectorFile(path, tuple(shape), version, read)


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _raw_rows(path: Path, shape: tuple[int, int], dtype: torch.dtype, offset: int) -> Iterator[Tensor]:
    row_bytes = shape[1] * dtype.itemsize
    step = max(1, _BATCH_BYTES // row_bytes)
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, shape[0], step):
            buffer = bytearray(min(step, shape[0] - start) * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{path}: the file changed while it was being read")
            yield torch.frombuffer(buffer, dtype=dtype).view(-1, shape[1])


def _npy_layout(path: Path) -> tuple[tuple[int, ...], torch.dtype, int]:
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = header(file)
            offset = file.tell()
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as .npy (without pickle): {error}") from error
    if dtype not in (np.float16, np.float32, np.float64) or not dtype.isnative:
        raise ValueError(f"{path}: expected float16, float32 or float64, got {dtype!r}")
    if fortran:
        raise ValueError(
            f"{path}: expected rows after each other, got Fortran order: save np.ascontiguousarray of it"
        )
    return shape, torch.from_numpy(np.empty(0, dtype)).dtype, offset


def _safetensors_layout(path: Path) -> tuple[tuple[int, ...], torch.dtype, int]:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        name = next(iter(entries)) if len(entries) == 1 else "embeddings"
        if name not in entries:
            there = ", ".join(entries) or "none"
            raise ValueError(f"expected one tensor, or one named 'embeddings', got: {there}")
        entry = entries[name]
        dtype, shape, start = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as .safetensors: {error}") from error
    if dtype not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: expected one of {', '.join(_SAFETENSORS_DTYPES)}, got {dtype}")
    return shape, _SAFETENSORS_DTYPES[dtype], 8 + length + start


def _parquet(path: Path, column: str | None) -> tuple[tuple[int, int], Callable[[], Iterator[Tensor]]]:
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError("parquet needs polars: pip install h2rec[train]") from error
    try:
        frame = pl.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
        lists = [name for name, dtype in schema.items() if isinstance(dtype, pl.List | pl.Array)]
        name = column if column is not None else lists[0] if len(lists) == 1 else None
        if name not in lists:
            asked = "exactly one column of lists" if column is None else f"a column of lists {column!r}"
            raise ValueError(f"{path}: expected {asked}, got: {', '.join(schema.names())}")
        num_rows = frame.select(pl.len()).collect().item()
        first = frame.select(pl.col(name)).head(1).collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
    dim = len(first.item()) if num_rows else 0
    if dim == 0:
        raise ValueError(f"{path}: expected rows with numbers in column {name!r}, got none")
    step = max(1, _SLICE_BYTES // (4 * dim))

    def read() -> Iterator[Tensor]:
        for start in range(0, num_rows, step):
            try:
                rows = frame.select(pl.col(name)).slice(start, step).collect().get_column(name)
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
                raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
            if (
                rows.null_count()
                or (rows.list.len() if isinstance(rows.dtype, pl.List) else rows.arr.len()).ne(dim).any()
            ):
                raise ValueError(f"{path}: expected {dim} numbers in every row of column {name!r}")
            values = rows.explode().cast(pl.Float32).to_numpy()
            yield torch.from_numpy(np.array(values).reshape(-1, dim))

    return (num_rows, dim), read

"""Content vectors of a catalog, one row per item."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

_ROWS_PER_CHECK = 65536  # a memory-mapped file is never read into memory as a whole


def read_embeddings(path: str | os.PathLike[str], *, num_items: int | None = None) -> np.ndarray:
    """Read content vectors from ``.npy`` or ``.safetensors``.

    Args:
        path: ``.npy`` (memory-mapped, never unpickled) or ``.safetensors`` with one tensor, or one named
            ``embeddings``.
        num_items: how many rows there must be; row r belongs to item r of the catalog.

    Returns:
        Array ``[N, D]`` in the file's dtype (fp16, fp32 or fp64; bf16 becomes fp32). An ``.npy`` is mapped
        copy-on-write: writing to the array never changes the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another extension, a damaged file, one that needs pickle, not a matrix, not floating
            point, rows that are not ``num_items``, rows with NaN or infinity (how many, and the first of
            them).
    """
    path = Path(path)
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected one of {', '.join(readers)}, got the extension {path.suffix!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    vectors = readers[path.suffix.lower()](path)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"{path}: expected a matrix [items, dimensions], got shape {list(vectors.shape)}")
    if vectors.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{path}: expected float16, float32 or float64, got {vectors.dtype!r}")
    if num_items is not None and len(vectors) != num_items:
        raise ValueError(
            f"{path}: expected {num_items} rows, one per item of the catalog, got {len(vectors)}"
        )
    _check_finite(path, vectors)
    return vectors


def _read_npy(path: Path) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as .npy (without pickle): {error}") from error
    if not isinstance(vectors, np.ndarray):
        raise ValueError(f"{path}: expected one array, got an .npz archive")
    return vectors


def _read_safetensors(path: Path) -> np.ndarray:
    try:
        # The torch framework, because numpy has no bf16.
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = names[0] if len(names) == 1 else "embeddings"
            if name not in names:
                raise ValueError(
                    f"{path}: expected one tensor, or one named 'embeddings', got: {', '.join(names) or 'none'}"
                )
            vectors = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as .safetensors: {error}") from error
    return (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()


def _check_finite(path: Path, vectors: np.ndarray) -> None:
    bad = np.concatenate(
        [
            start + np.flatnonzero(~np.isfinite(vectors[start : start + _ROWS_PER_CHECK]).all(axis=1))
            for start in range(0, len(vectors), _ROWS_PER_CHECK)
        ]
    )
    if len(bad):
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(f"{path}: {len(bad)} of {len(vectors)} rows hold NaN or infinity: {shown}")

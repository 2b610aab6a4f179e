"""Vectors from wherever they are, as batches of one size: a tensor, an array, a memory map, or a stream."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from h2rec.ops._checks import NAMED, first_few

_Batches = Iterable[Tensor | np.ndarray]
VectorSource = Tensor | np.ndarray | _Batches | Callable[[], _Batches]


def vector_batches(vectors: VectorSource, batch_size: int, *, name: str = "vectors") -> Iterator[Tensor]:
    """Goes through the rows of ``vectors`` in order.

    Args:
        vectors: ``[N, D]`` floating point; or a collection or iterator of such batches of any size, or a function
            without arguments that returns one; the rows are dealt out anew, so that the source's own batches make no
            difference.
        batch_size: rows of each batch but the last.
        name: what errors call the vectors.

    Yields:
        ``[B, D]`` fp32, on the device of the vectors; it may share memory with them.

    Raises:
        ValueError: a shape is wrong; or, after the last batch, rows were not finite in fp32 (they were yielded as
            zeros): their count and the first of them.
        TypeError: nothing of that kind, or a dtype is not floating point.
    """
    start, num_bad, first_bad = 0, 0, []
    for batch in _deal_out(vectors, batch_size, name):
        bad = ~batch.isfinite().all(dim=1)
        if bad.any():
            rows = bad.nonzero().flatten()
            num_bad += len(rows)
            first_bad += (rows[:NAMED] + start).tolist()
            batch = batch.masked_fill(bad.unsqueeze(1), 0)
        start += len(batch)
        yield batch
    if num_bad:
        raise ValueError(
            f"{name} must be finite, but {num_bad} of {start} rows hold NaN or infinity "
            f"({first_few('row', first_bad, num_bad)})"
        )


def check_repeatable(vectors: VectorSource, name: str = "vectors") -> None:
    """Refuses what gives its rows only once, where they are needed again and again."""
    if isinstance(vectors, Iterator):
        raise TypeError(
            f"{name} are read several times, but an iterator gives them once: pass a list of batches, or a function "
            f"that returns an iterator, got {type(vectors).__name__}"
        )


def _deal_out(vectors: VectorSource, batch_size: int, name: str) -> Iterator[Tensor]:
    if isinstance(vectors, Tensor | np.ndarray):
        _check(vectors, name)
        for start in range(0, len(vectors), batch_size):
            yield _to_float32(vectors[start : start + batch_size])
        return
    if not callable(vectors) and not isinstance(vectors, Iterable):
        raise TypeError(
            f"{name} must be a tensor, an array, batches, or a function that returns an iterator of batches, "
            f"got {type(vectors).__name__}"
        )
    waiting: list[Tensor] = []
    num_waiting = 0
    dim = None
    for batch in vectors() if callable(vectors) else vectors:
        _check(batch, name)
        if dim is not None and batch.shape[1] != dim:
            raise ValueError(f"{name} must have one dimension, got batches of {dim} and of {batch.shape[1]}")
        dim = batch.shape[1]
        waiting.append(_to_float32(batch))
        num_waiting += len(batch)
        if num_waiting >= batch_size:
            rows = torch.cat(waiting)
            whole = num_waiting - num_waiting % batch_size
            yield from rows[:whole].split(batch_size)
            waiting, num_waiting = [rows[whole:]], num_waiting - whole
    if num_waiting:
        yield torch.cat(waiting)


def _check(vectors: Tensor | np.ndarray, name: str) -> None:
    if not isinstance(vectors, Tensor | np.ndarray):
        raise TypeError(f"{name} must come in tensors or arrays, got {type(vectors).__name__}")
    floating = vectors.is_floating_point() if isinstance(vectors, Tensor) else vectors.dtype.kind == "f"
    if not floating:
        raise TypeError(f"{name} must be floating point, got {vectors.dtype}")
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D] with D >= 1, got {list(vectors.shape)}")


def _to_float32(vectors: Tensor | np.ndarray) -> Tensor:
    if isinstance(vectors, Tensor):
        return vectors.detach().to(torch.float32)
    # Overflow is reported with the rows that are not finite.
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(vectors, dtype=np.float32))

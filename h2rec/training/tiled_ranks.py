"""Ranks in a catalog whose vectors are never all there, nor the scores of a user for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from h2rec.models import SequentialModel

# Scores held at a time, [users, items]: a tile that stays in cache is faster on a CPU; a GPU wants few launches.
_TILE = {"cpu": (256, 2048), "cuda": (4096, 16384)}
_SAY_EVERY = 10.0  # seconds


def ranks_in_catalog(
    model: SequentialModel,
    users: Tensor,
    targets: Tensor,
    *,
    hidden: tuple[np.ndarray, np.ndarray] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Rank of each user's target among all items: 1 + those above + half of its ties, in one sweep over the catalog.

    Scores tie that rounding cannot tell apart: of items with equal vectors a matrix product may make different scores.

    Args:
        users: ``[n, C]`` user vectors.
        targets: ``[n]`` item ids.
        hidden: (user's row, item) of what is left out; a target is never left out.
        progress: called after each part of the catalog with the items that are done.

    Returns:
        float64 ``[n]``.

    Raises:
        FloatingPointError: an item vector is not finite.
    """
    low, high = _bounds(users, model.item_vectors(targets))
    lead = torch.zeros(len(users), dtype=torch.float64, device=users.device)  # items above - items below
    num_users, num_items = _TILE.get(users.device.type, _TILE["cuda"])
    rows, items = _sorted_by_item(hidden, targets)
    start = 0
    for part in model.item_vector_parts():
        if not part.isfinite().all():
            raise FloatingPointError("the model's item vectors are not finite")
        for vectors in part.split(num_items):
            stop = start + len(vectors)
            within = slice(*np.searchsorted(items, [start, stop]))
            for first in range(0, len(users), num_users):
                of_users = slice(first, first + num_users)
                scores = users[of_users] @ vectors.T  # [users, items]
                mine = (rows[within] >= first) & (rows[within] < first + num_users)
                if mine.any():
                    scores[rows[within][mine] - first, items[within][mine] - start] = -torch.inf
                lead[of_users] += _lead(scores, low[of_users], high[of_users])
            start = stop
        if progress is not None:
            progress(start)
    return (start + 1 + lead) / 2


def sweep_progress(name: str, num_items: int) -> Callable[[int], None]:
    """Says how far a sweep is and how fast, every few seconds, for `ranks_in_catalog`."""
    started = said = time.perf_counter()

    def show(done: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said >= _SAY_EVERY:
            said = now
            rate = done / (now - started)
            print(f"{name}: ranking, {done:,} of {num_items:,} items, {rate:,.0f} items/s", flush=True)

    return show


def ranks_among(users: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """The same among the target and some other items: float64 ``[n]``.

    Args:
        users, targets, others: vectors ``[n, C]``, ``[n, C]`` and ``[n, m, C]``.
    """
    scores = torch.einsum("nc,nmc->nm", users, others)
    return (scores.shape[1] + 2 + _lead(scores, *_bounds(users, targets))) / 2


def _bounds(users: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Between these, ``[n, 1]`` each, scores tie with the target's: two sums of the same C products differ by less."""
    products = users * targets
    score = products.sum(1, keepdim=True)
    slack = users.shape[1] * torch.finfo(users.dtype).eps * products.abs().sum(1, keepdim=True)
    return score - slack, score + slack


def _lead(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((scores > high).sum(1) - (scores < low).sum(1)).double()


def _sorted_by_item(
    hidden: tuple[np.ndarray, np.ndarray] | None, targets: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    if hidden is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    rows, items = hidden
    others = items != targets.cpu().numpy()[rows]
    rows, items = rows[others], items[others]
    order = items.argsort(kind="stable")
    return rows[order], items[order]

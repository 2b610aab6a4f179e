"""Head, tail and popularity bands, by what the training split counts."""

from __future__ import annotations

import numpy as np

POPULARITY_BANDS: tuple[tuple[str, int, int | None], ...] = (
    ("0", 0, 0),
    ("1-9", 1, 9),
    ("10-29", 10, 29),
    ("30-59", 30, 59),
    ("60-99", 60, 99),
    ("100+", 100, None),
)
"""Name, lowest and highest training count of each band; the last one is open."""


def popularity_head(train_counts: np.ndarray) -> np.ndarray:
    """Which items are head: the ceil(20 %) with the highest counts, ties to the lower id.

    Args:
        train_counts: integers ``[num_items]``, from `Split.train_counts`.

    Returns:
        bool ``[num_items]``; the rest is the tail.
    """
    counts = _checked(train_counts)
    head = np.zeros(len(counts), dtype=bool)
    head[np.argsort(-counts, kind="stable")[: -(-len(counts) // 5)]] = True
    return head


def popularity_band(train_counts: np.ndarray) -> np.ndarray:
    """Band of each item, as an index into `POPULARITY_BANDS`: int64 ``[num_items]``."""
    lowest = np.array([low for _, low, _ in POPULARITY_BANDS])
    return np.searchsorted(lowest, _checked(train_counts), side="right") - 1


def _checked(train_counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(train_counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu":
        raise ValueError(
            f"train_counts: expected integers [num_items], got {counts.dtype} {list(counts.shape)}"
        )
    if len(counts) and counts.min() < 0:
        raise ValueError(f"train_counts: expected counts of 0 or more, got {counts.min()}")
    return counts.astype(np.int64, copy=False)

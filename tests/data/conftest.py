from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pytest

from h2rec import data


@pytest.fixture(scope="session")
def make_log() -> Callable[..., data.InteractionLog]:
    def make(sequences: Sequence[Sequence[int]], num_items: int) -> data.InteractionLog:
        """A log of these item ids, one sequence per user, users named 0, 1, 2, ..."""
        offsets = np.cumsum([0, *map(len, sequences)])
        items = np.array([item for sequence in sequences for item in sequence], dtype=np.int64)
        users = pl.Series(range(len(sequences)), dtype=pl.Int64)
        return data.InteractionLog(users, data.ItemCatalog(pl.Series(range(num_items))), offsets, items)

    return make


@pytest.fixture(scope="session")
def make_split(make_log) -> Callable[..., data.Split]:
    return lambda sequences, num_items: data.leave_one_out(make_log(sequences, num_items))


@pytest.fixture(scope="session")
def random_split(make_split) -> data.Split:
    """200 users with 1 to 40 of 60 items, some of them repeatedly."""
    rng = np.random.default_rng(0)
    return make_split([rng.integers(0, 60, rng.integers(1, 41)).tolist() for _ in range(200)], 60)

"""h2rec._catalog against numpy."""

import os
import threading
import time

import numpy as np
import pytest

if os.environ.get("H2REC_BUILD_EXT") == "0":
    pytest.skip("h2rec was asked to be built without extensions", allow_module_level=True)

from h2rec import semantic_ids
from h2rec._catalog import co_occurrence, group_codes, place_items

RNG = np.random.default_rng(0)
CATALOGS = {
    "no items": np.zeros((0, 3), dtype=np.int32),
    "one item": np.array([[4, 0]], dtype=np.int32),
    "all equal": np.full((17, 4), 3, dtype=np.int32),
    "all zero": np.zeros((17, 4), dtype=np.int32),
    "all distinct": np.arange(101, dtype=np.int32)[::-1].reshape(-1, 1).copy(),
    "one level": RNG.integers(0, 7, (97, 1), dtype=np.int32),
    "many groups": RNG.integers(0, 5, (1009, 4), dtype=np.int32),
    "few groups": RNG.integers(0, 2, (1009, 3), dtype=np.int32),
    "ragged levels": RNG.integers(0, [3, 1, 300, 2], (1009, 4)).astype(np.int32),
    "one below 16 bits": RNG.integers(65530, 65536, (1009, 2), dtype=np.int32),
    "one above 16 bits": RNG.integers(65534, 65538, (1009, 2), dtype=np.int32),
    "largest codes": RNG.integers(2**31 - 3, 2**31 - 1, (97, 2), dtype=np.int32, endpoint=True),
    "both digits": (RNG.integers(0, 3, (1009, 2)) * 65536 + RNG.integers(0, 3, (1009, 2))).astype(np.int32),
}


@pytest.mark.parametrize("codes", CATALOGS.values(), ids=CATALOGS)
def test_sorts_and_groups_as_numpy_does(codes: np.ndarray):
    before = codes.copy()
    order, starts = group_codes(codes)
    assert order.dtype == starts.dtype == np.int64
    np.testing.assert_array_equal(order, np.lexsort(codes.T[::-1]))
    _, sizes = np.unique(codes, axis=0, return_counts=True)
    np.testing.assert_array_equal(starts, np.concatenate([[0], np.cumsum(sizes)]))
    np.testing.assert_array_equal(codes, before)


@pytest.mark.parametrize("codes", CATALOGS.values(), ids=CATALOGS)
def test_agrees_with_what_takes_its_place(codes: np.ndarray):
    for ours, theirs in zip(group_codes(codes), semantic_ids._group_codes_with_numpy(codes), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 2), dtype=np.int64), "codes must have dtype int32, got int64"),
        (np.zeros((3, 2), dtype=">i4"), "codes must have dtype int32, got >i4"),
        (np.zeros(3, dtype=np.int32), r"codes must have shape \[num_items, num_levels\].*got \(3,\)"),
        (np.zeros((3, 0), dtype=np.int32), r"with at least one level, got \(3, 0\)"),
        (np.zeros((3, 4), dtype=np.int32)[:, ::2], "codes must be C-contiguous"),
        (np.array([[0, 1], [2, -5]], dtype=np.int32), r"codes must not be negative, got -5 at \[1, 1\]"),
    ],
)
def test_refuses(codes: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        group_codes(codes)


def test_other_threads_run_meanwhile():
    codes = np.random.default_rng(0).integers(0, 256, (1_000_000, 4), dtype=np.int32)
    done, ticks = threading.Event(), []

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    start = time.perf_counter()
    group_codes(codes)
    end = time.perf_counter()
    done.set()
    other.join()
    assert sum(start < tick < end for tick in ticks) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": np.zeros((3, 2), dtype=np.int64)}, "candidates must be C-contiguous, int32"),
        ({"candidates": np.zeros((2, 2), dtype=np.int32)}, r"candidates must be .* got int32 \(2, 2\)"),
        ({"candidates": np.zeros((3, 0), dtype=np.int32)}, "candidates two with at least one column"),
        ({"candidates": np.full((3, 2), 9, dtype=np.int32)}, r"codes must lie in \[0, 5\), got 9"),
        ({"settled_codes": np.array([-1], dtype=np.int32)}, r"codes must lie in \[0, 5\), got -1"),
        ({"settled_prefixes": np.zeros(2, dtype=np.int64)}, "settled_codes must be .* a length that fits"),
        ({"prefixes": np.zeros(3, dtype=np.int32)}, "prefixes must be C-contiguous, int64"),
    ],
)
def test_place_items_refuses(change: dict, message: str):
    arguments = {
        "prefixes": np.zeros(3, dtype=np.int64),
        "candidates": np.zeros((3, 2), dtype=np.int32),
        "settled_prefixes": np.zeros(1, dtype=np.int64),
        "settled_codes": np.zeros(1, dtype=np.int32),
        "num_codes": 5,
        "capacity": 1,
    }
    with pytest.raises(ValueError, match=message):
        place_items(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": np.array([0, 5])}, r"items must lie in \[0, 5\), got 5"),
        ({"items": np.array([0, -1])}, r"items must lie in \[0, 5\), got -1"),
        ({"items": np.array([0, 1, 2])}, "offsets must end with the number of items"),
        ({"items": np.array([0, 1], dtype=np.int32)}, "items must be C-contiguous, int64"),
        ({"offsets": np.array([0, 3, 2])}, "offsets must ascend from 0"),
        ({"offsets": np.array([1, 2])}, "offsets must ascend from 0"),
        ({"offsets": np.array([], dtype=np.int64)}, "offsets must end with the number of items"),
        ({"num_items": 2**31}, r"num_items times window must not exceed 2\^32"),
    ],
)
def test_co_occurrence_refuses(change: dict, message: str):
    arguments = {
        "items": np.array([0, 1]),
        "offsets": np.array([0, 2]),
        "num_items": 5,
        "window": 3,
        "min_count": 1,
        "max_per_item": 9,
        "is_ppmi": True,
        "discount": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        co_occurrence(**arguments | change)

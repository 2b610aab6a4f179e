import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2rec.data import POPULARITY_BANDS, popularity_band, popularity_head


def test_head_is_a_fifth_rounded_up_and_ties_go_to_the_lower_id():
    assert np.flatnonzero(popularity_head(np.array([3, 9, 3, 3, 0, 1]))).tolist() == [0, 1]
    assert np.flatnonzero(popularity_head(np.zeros(10, dtype=np.int64))).tolist() == [0, 1]
    assert popularity_head(np.array([5])).tolist() == [True]
    assert popularity_head(np.array([0, 2**40])).tolist() == [False, True]


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_head_agrees_with_the_obvious_way(counts):
    order = sorted(range(len(counts)), key=lambda item: (-counts[item], item))
    expected = sorted(order[: (len(counts) + 4) // 5])
    assert np.flatnonzero(popularity_head(np.array(counts))).tolist() == expected


def test_bands_meet_without_gap_or_overlap():
    counts = np.arange(300)
    bands = popularity_band(counts)
    for index, (_, low, high) in enumerate(POPULARITY_BANDS):
        inside = (counts >= low) & (counts <= (np.inf if high is None else high))
        assert (inside == (bands == index)).all()
    assert [name for name, _, _ in POPULARITY_BANDS] == ["0", "1-9", "10-29", "30-59", "60-99", "100+"]
    assert bands.dtype == np.int64


@pytest.mark.parametrize("function", [popularity_head, popularity_band])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([1.0]), r"train_counts: expected integers \[num_items\], got float64 \[1\]"),
        (np.array([[1]]), r"train_counts: expected integers \[num_items\], got int64 \[1, 1\]"),
        (np.array([1, -2]), "train_counts: expected counts of 0 or more, got -2"),
    ],
)
def test_refuses(function, counts, message):
    with pytest.raises(ValueError, match=message):
        function(counts)

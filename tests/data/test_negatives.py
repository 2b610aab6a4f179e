import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2rec.data import sample_negatives
from h2rec.data.negatives import UnseenItems


def flat(sequences):
    return np.cumsum([0, *map(len, sequences)]), np.array([i for s in sequences for i in s], dtype=np.int64)


@given(sequences=st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=5))
def test_unseen_items_are_the_complement_in_order(sequences):
    unseen = UnseenItems(*flat(sequences), num_items=7)
    for user, sequence in enumerate(sequences):
        expected = sorted(set(range(7)) - set(sequence))
        assert unseen.counts[user] == len(expected)
        assert unseen.items(np.full(len(expected), user), np.arange(len(expected))).tolist() == expected


def test_draws_are_uniform_over_what_is_unseen():
    unseen = UnseenItems(*flat([[0, 3, 3, 9], []]), num_items=10)
    draws = unseen.draw(np.array([0, 1]), 70_000, np.random.default_rng(0))
    counts = np.bincount(draws[0], minlength=10)
    assert (counts[[0, 3, 9]] == 0).all()
    assert abs(counts[[1, 2, 4, 5, 6, 7, 8]] - 10_000).max() < 500  # five standard deviations
    assert abs(np.bincount(draws[1], minlength=10) - 7_000).max() < 450


def test_keys_do_not_overflow_on_a_large_catalog():
    num_items = 2**40
    unseen = UnseenItems(*flat([[0], [num_items - 1, 5]]), num_items)
    assert unseen.items(np.array([0, 1, 1]), np.array([0, 5, num_items - 3])).tolist() == [
        1,
        6,
        num_items - 2,
    ]


@pytest.mark.parametrize("stage", ["valid", "test"])
def test_negatives_are_distinct_and_outside_the_whole_sequence(random_split, stage):
    negatives = sample_negatives(random_split, stage, num_negatives=15, seed=3)
    log = random_split.log
    assert negatives.shape == (200, 15)
    assert negatives.dtype == np.int64
    for user, row in enumerate(negatives):
        if random_split.targets(stage)[user] < 0:
            assert (row == -1).all()
            continue
        assert len(set(row.tolist())) == 15
        assert not set(row.tolist()) & set(log.items[log.offsets[user] : log.offsets[user + 1]].tolist())
        assert row.min() >= 0
        assert row.max() < 60


def test_negatives_may_be_all_that_is_left(make_split):
    negatives = sample_negatives(make_split([[0, 1, 2, 0, 5], [9, 8, 7]], 10), "test", num_negatives=6)
    assert sorted(negatives[0].tolist()) == [3, 4, 6, 7, 8, 9]


def test_subsets_are_uniform(make_split):
    negatives = sample_negatives(make_split([[0, 1, 2]] * 6000, 8), "test", num_negatives=2)
    subsets, counts = np.unique(np.sort(negatives, axis=1), axis=0, return_counts=True)
    assert len(subsets) == 10
    assert abs(counts - 600).max() < 120  # five standard deviations


def test_negatives_depend_on_seed_and_stage_only(random_split):
    first = sample_negatives(random_split, "test", 10, seed=1)
    np.testing.assert_array_equal(first, sample_negatives(random_split, "test", 10, seed=1))
    assert (first != sample_negatives(random_split, "test", 10, seed=2)).any()
    assert (first != sample_negatives(random_split, "valid", 10, seed=1)).any()


def test_refuses(make_split):
    split = make_split([[0, 1, 2, 3], [4, 5, 5, 4]], 6)
    with pytest.raises(ValueError, match="how many of the 6 items user 0 has not had, got 3") as error:
        sample_negatives(split, "test", 3)
    assert "expected at most 2" in str(error.value)
    with pytest.raises(ValueError, match="num_negatives: expected at least 1, got 0"):
        sample_negatives(split, "test", 0)
    with pytest.raises(ValueError, match="stage: expected 'valid' or 'test', got 'train'"):
        sample_negatives(split, "train", 1)


def test_nobody_to_rank_needs_no_negatives(make_split):
    assert sample_negatives(make_split([[0, 1], [2]], 3), "test", 2).tolist() == [[-1, -1], [-1, -1]]

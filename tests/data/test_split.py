import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2rec import data

SEQUENCES = st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=8)


def test_leave_one_out_by_hand(make_split):
    split = make_split([[4, 2, 0, 3], [1], [5, 5, 4], [], [2, 3]], 6)
    assert split.train_items.tolist() == [4, 2, 1, 5, 2, 3]
    assert split.train_offsets.tolist() == [0, 2, 3, 4, 4, 6]
    assert split.valid_targets.tolist() == [0, -1, 5, -1, -1]
    assert split.test_targets.tolist() == [3, -1, 4, -1, -1]
    assert split.short_users == 3
    assert (split.num_users, split.num_items) == (5, 6)
    assert split.train_counts().tolist() == [0, 1, 2, 1, 1, 1]
    for array in (split.train_items, split.train_offsets, split.valid_targets, split.train_counts()):
        assert array.dtype == np.int64


@given(sequences=SEQUENCES)
def test_agrees_with_the_obvious_way(make_split, sequences):
    split = make_split(sequences, 10)
    train = [s[:-2] if len(s) >= 3 else s for s in sequences]
    assert split.train_items.tolist() == [item for sequence in train for item in sequence]
    assert np.diff(split.train_offsets).tolist() == [len(sequence) for sequence in train]
    assert split.targets("valid").tolist() == [s[-2] if len(s) >= 3 else -1 for s in sequences]
    assert split.targets("test").tolist() == [s[-1] if len(s) >= 3 else -1 for s in sequences]
    assert split.train_counts().sum() == len(split.train_items)


@given(sequences=SEQUENCES)
def test_held_out_items_do_not_reach_counts(make_split, sequences):
    changed = [s[:-2] + [9 - item for item in s[-2:]] if len(s) >= 3 else s for s in sequences]
    counts = [make_split(s, 10).train_counts().tolist() for s in (sequences, changed)]
    assert counts[0] == counts[1]


def test_nothing_held_out(make_split):
    log = make_split([[4, 2, 0, 3], [1], []], 6).log
    split = data.nothing_held_out(log)
    assert split.train_items.tolist() == [4, 2, 0, 3, 1]
    assert split.train_offsets.tolist() == [0, 4, 5, 5]
    assert split.valid_targets.tolist() == split.test_targets.tolist() == [-1, -1, -1]
    assert split.short_users == 2


def test_unknown_stage(make_split):
    with pytest.raises(ValueError, match="stage: expected 'valid' or 'test', got 'train'"):
        make_split([[1, 2, 3]], 6).targets("train")

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from h2rec.data import EvalBatches, TrainBatches


def train_sequences(split):
    return [
        split.train_items[a:b].tolist()
        for a, b in zip(split.train_offsets, split.train_offsets[1:], strict=False)
    ]


def users_of(batches):
    return [user for batch in batches for user in batch.user_ids.tolist()]


def same(left, right):
    return len(left) == len(right) and all(
        (a is None and b is None) or torch.equal(a, b)
        for pair in zip(left, right, strict=True)
        for a, b in zip(*pair, strict=True)
    )


def test_train_batch_by_hand(make_split):
    split = make_split([[1, 2, 3, 4, 5, 0, 0], [6, 7, 0, 0], [8, 0, 0], [9]], 10)
    (batch,) = TrainBatches(split, batch_size=4, max_length=3)
    assert batch.user_ids.tolist() == [1, 0]
    assert batch.item_ids.tolist() == [[6, 10, 10], [2, 3, 4]]
    assert batch.targets.tolist() == [[7, 10, 10], [3, 4, 5]]
    assert batch.lengths.tolist() == [1, 3]
    assert batch.negatives is None
    assert {tensor.dtype for tensor in batch[:4]} == {torch.int64}


def test_eval_batches_by_hand(make_split):
    split = make_split([[1, 2, 3, 4, 5], [6, 7], [8, 9, 0]], 10)
    (valid,) = EvalBatches(split, "valid", batch_size=4, max_length=2)
    assert valid.user_ids.tolist() == [2, 0]
    assert valid.item_ids.tolist() == [[8, 10], [2, 3]]
    assert valid.lengths.tolist() == [1, 2]
    assert valid.targets.tolist() == [9, 4]
    (test,) = EvalBatches(split, "test", batch_size=4, max_length=3)
    assert test.user_ids.tolist() == [2, 0]
    assert test.item_ids.tolist() == [[8, 9, 10], [2, 3, 4]]
    assert test.targets.tolist() == [0, 5]
    assert test.negatives is None


@pytest.mark.parametrize("stage", ["valid", "test"])
def test_eval_batches_are_ordered_by_length_and_then_by_user(make_split, stage):
    """Whatever the sort does with ties: the order decides how scores round, and a run is to be repeatable anywhere."""
    lengths = np.random.default_rng(0).integers(3, 6, 400)
    batches = EvalBatches(
        make_split([[0] * length for length in lengths], 3), stage, batch_size=64, max_length=9
    )
    expected = sorted(range(400), key=lambda user: (lengths[user], user))
    assert users_of(batches) == expected


@given(
    sequences=st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=20),
    batch_size=st.integers(1, 5),
    max_length=st.integers(1, 8),
    epoch=st.integers(0, 3),
)
def test_train_batches_agree_with_the_obvious_way(make_split, sequences, batch_size, max_length, epoch):
    sequences.append([0, 1])  # somebody to train on
    split = make_split(sequences, 9)
    expected = {user: s[-max_length - 1 :] for user, s in enumerate(train_sequences(split)) if len(s) >= 2}
    batches = TrainBatches(split, batch_size=batch_size, max_length=max_length)
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(users_of(found)) == sorted(expected)
    for batch in found:
        rows, width = batch.item_ids.shape
        assert rows <= batch_size
        assert width == batch.lengths.max()
        for user, items, length, targets in zip(*(t.tolist() for t in batch[:4]), strict=True):
            assert items == expected[user][:-1] + [9] * (width - length)
            assert targets == expected[user][1:] + [9] * (width - length)


@given(
    sequences=st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=20),
    stage=st.sampled_from(["valid", "test"]),
    batch_size=st.integers(1, 5),
    max_length=st.integers(1, 8),
    world_size=st.integers(1, 3),
)
def test_eval_batches_have_every_user_once(make_split, sequences, stage, batch_size, max_length, world_size):
    split = make_split(sequences, 9)
    held_out = 1 if stage == "test" else 2
    expected = {
        u: (s[:-held_out][-max_length:], s[-held_out]) for u, s in enumerate(sequences) if len(s) >= 3
    }
    users = []
    for rank in range(world_size):
        batches = EvalBatches(
            split, stage, batch_size=batch_size, max_length=max_length, rank=rank, world_size=world_size
        )
        found = list(batches)
        assert len(found) == len(batches)
        users += users_of(found)
        for batch in found:
            width = batch.item_ids.shape[1]
            for user, items, length, target in zip(*(t.tolist() for t in batch[:4]), strict=True):
                assert items[:length] == expected[user][0]
                assert items[length:] == [9] * (width - length)
                assert target == expected[user][1]
    assert sorted(users) == sorted(expected)


def test_held_out_items_do_not_reach_training(make_split, random_split):
    log = random_split.log
    sequences = [log.items[a:b].tolist() for a, b in zip(log.offsets, log.offsets[1:], strict=False)]
    changed = [s[:-2] + [59 - item for item in s[-2:]] if len(s) >= 3 else s for s in sequences]
    options = {"batch_size": 16, "max_length": 10, "num_negatives": 8}
    before, after = (list(TrainBatches(make_split(s, 60), **options)) for s in (sequences, changed))
    assert same(before, after)  # the negatives too: what they avoid is the training items


def test_negatives_avoid_training_items_and_nothing_else(make_split):
    split = make_split([[0, 1, 2, 3, 4, 5], [5, 5, 4, 3], [6, 7, 0, 1, 2, 6, 3, 1]], 8)
    drawn = {user: set() for user in range(3)}
    batches = TrainBatches(split, batch_size=2, max_length=5, num_negatives=6)
    for epoch in range(20):
        batches.set_epoch(epoch)
        for batch in batches:
            assert batch.negatives.shape == (*batch.item_ids.shape, 6)
            assert ((batch.negatives == 8).all(dim=2) == (batch.item_ids == 8)).all()
            assert ((batch.negatives == 8).any(dim=2) == (batch.item_ids == 8)).all()
            for user, row in zip(batch.user_ids.tolist(), batch.negatives, strict=True):
                drawn[user] |= set(row.flatten().tolist()) - {8}
    train = train_sequences(split)
    assert drawn == {user: set(range(8)) - set(train[user]) for user in range(3)}  # held-out items among them


def test_negatives_of_a_user_who_has_had_nearly_everything(make_split):
    split = make_split([list(range(1, 1000)) * 2 + [0, 0]], 1000)
    (batch,) = TrainBatches(split, batch_size=1, max_length=5, num_negatives=50)
    assert batch.negatives.tolist() == [[[0] * 50] * 5]


def test_user_who_has_had_everything(make_split):
    split = make_split([[0, 1, 2, 0, 0], [2, 1]], 3)
    assert len(list(TrainBatches(split, batch_size=2, max_length=5))) == 1
    with pytest.raises(ValueError, match="for 1 users who have had all 3 items, the first of them user 0"):
        TrainBatches(split, batch_size=2, max_length=5, num_negatives=1)


@pytest.mark.parametrize("num_negatives", [0, 4])
def test_same_seed_and_epoch_same_batches(random_split, num_negatives):
    def epoch_of(epoch, seed=0):
        options = {"num_negatives": num_negatives, "seed": seed}
        batches = TrainBatches(random_split, batch_size=16, max_length=10, **options)
        batches.set_epoch(epoch)
        return list(batches)

    assert same(epoch_of(3), epoch_of(3))
    assert not same(epoch_of(3), epoch_of(4))
    assert not same(epoch_of(3), epoch_of(3, seed=1))


def test_iterating_twice_is_the_same_epoch(random_split):
    batches = TrainBatches(random_split, batch_size=16, max_length=10, num_negatives=4)
    assert same(list(batches), list(batches))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 5, 16, 500])
def test_ranks_share_the_users_and_the_number_of_batches(random_split, world_size, batch_size):
    ranks = [
        list(
            TrainBatches(
                random_split,
                batch_size=batch_size,
                max_length=10,
                rank=rank,
                world_size=world_size,
                num_negatives=3,
            )
        )
        for rank in range(world_size)
    ]
    sizes = [[len(batch.user_ids) for batch in batches] for batches in ranks]
    assert all(size == sizes[0] for size in sizes)
    assert min(sizes[0]) >= 1
    users = [user for batches in ranks for user in users_of(batches)]
    trainable = sum(len(sequence) >= 2 for sequence in train_sequences(random_split))
    assert len(users) == len(set(users)) == trainable - trainable % world_size


def test_every_batch_draws_negatives_of_its_own(make_split):
    split = make_split([[0, 1]] * 8, 1000)
    drawn = []
    for rank in range(2):
        options = {"batch_size": 2, "max_length": 5, "num_negatives": 9, "rank": rank, "world_size": 2}
        batches = TrainBatches(split, **options)
        for epoch in range(2):
            batches.set_epoch(epoch)
            drawn += [tuple(batch.negatives.flatten().tolist()) for batch in batches]
    assert len(set(drawn)) == len(drawn) == 8


def test_similar_lengths_stand_together_but_epochs_differ(make_split):
    rng = np.random.default_rng(0)
    split = make_split([[0] * (2 + int(rng.exponential(8))) for _ in range(4000)], 3)
    batches = TrainBatches(split, batch_size=16, max_length=50)
    found = list(batches)
    cells = sum(batch.item_ids.numel() for batch in found)
    items = sum(int(batch.lengths.sum()) for batch in found)
    assert cells < 1.5 * items
    widths = np.array([batch.item_ids.shape[1] for batch in found])
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.3  # batches are shuffled, not sorted
    together = [{frozenset(batch.user_ids.tolist()) for batch in found}]
    batches.set_epoch(1)
    together.append({frozenset(batch.user_ids.tolist()) for batch in batches})
    assert not together[0] & together[1]


def test_a_small_log_still_mixes(make_split):
    split = make_split([[0] * (4 + user) for user in range(64)], 3)  # 8 batches, all lengths different
    batches = TrainBatches(split, batch_size=8, max_length=100)
    together = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        together.append({frozenset(batch.user_ids.tolist()) for batch in batches})
    assert not together[0] & together[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader_neither_repeats_nor_reorders(random_split, num_workers):
    for batches in (
        TrainBatches(random_split, batch_size=16, max_length=10, num_negatives=2),
        EvalBatches(random_split, "test", batch_size=16, max_length=10),
    ):
        loaded = list(DataLoader(batches, batch_size=None, num_workers=num_workers))
        assert same(loaded, list(batches))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_length": 0}, "max_length: expected at least 1, got 0"),
        ({"world_size": 0}, "world_size: expected at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank: expected a number in \[0, 2\), got 2"),
        ({"rank": -1}, r"rank: expected a number in \[0, 1\), got -1"),
    ],
)
def test_refuses(random_split, arguments, message):
    arguments = {"batch_size": 4, "max_length": 5, **arguments}
    with pytest.raises(ValueError, match=message):
        TrainBatches(random_split, **arguments)
    with pytest.raises(ValueError, match=message):
        EvalBatches(random_split, "test", **arguments)


def test_refuses_negatives(random_split):
    with pytest.raises(ValueError, match="num_negatives: expected 0 or more, got -1"):
        TrainBatches(random_split, batch_size=4, max_length=5, num_negatives=-1)


def test_nobody_to_train_on(make_split):
    with pytest.raises(
        ValueError, match=r"split: expected at least 1 users .* with two training items, got 0"
    ):
        TrainBatches(make_split([[0, 1, 2], [1]], 3), batch_size=4, max_length=5)
    with pytest.raises(ValueError, match=r"split: expected at least 2 users \(one per rank\) .*, got 1"):
        TrainBatches(make_split([[0, 1]], 3), batch_size=4, max_length=5, world_size=2)


def test_unknown_stage(random_split):
    with pytest.raises(ValueError, match="stage: expected 'valid' or 'test', got 'dev'"):
        EvalBatches(random_split, "dev", batch_size=4, max_length=5)

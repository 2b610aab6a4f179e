import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2rec.data import CoOccurrence, co_occurrence

SEQUENCES = st.lists(st.lists(st.integers(0, 5), max_size=10), min_size=1, max_size=8)


def rows_of(found: CoOccurrence) -> dict[int, dict[int, float]]:
    spans = zip(found.offsets, found.offsets[1:], strict=False)
    rows = {
        i: dict(zip(found.neighbours[a:b], found.weights[a:b], strict=True)) for i, (a, b) in enumerate(spans)
    }
    return {item: row for item, row in rows.items() if row}


def obvious(sequences, window, min_count, max_per_item, weight):
    """The definition, pair by pair, over training sequences."""
    counts, decayed = defaultdict(int), defaultdict(float)
    for sequence in sequences:
        train = sequence[:-2] if len(sequence) >= 3 else sequence
        for i, a in enumerate(train):
            for j, b in enumerate(train):
                if a != b and abs(i - j) <= window:
                    counts[a, b] += 1
                    decayed[a, b] += 1 / abs(i - j)
    marginal = defaultdict(int)
    for (a, _), count in counts.items():
        marginal[a] += count
    rows = defaultdict(dict)
    for (a, b), count in counts.items():
        strength = decayed[a, b]
        if weight == "ppmi":
            strength = math.log(count * sum(counts.values()) / (marginal[a] * marginal[b]))
        if count >= min_count and strength > 1e-12:
            rows[a][b] = strength
    scaled = {}
    for a, row in rows.items():
        kept = dict(sorted(row.items(), key=lambda pair: (-round(pair[1], 9), pair[0]))[:max_per_item])
        low, high = min(kept.values()), max(kept.values())
        flat = high - low < 1e-12
        scaled[a] = {b: 0.7 if flat else 0.3 + 0.7 * (s - low) / (high - low) for b, s in kept.items()}
    return scaled


@pytest.mark.parametrize("weight", ["ppmi", "decay"])
@given(
    sequences=SEQUENCES, window=st.integers(1, 4), min_count=st.integers(1, 3), max_per_item=st.integers(1, 6)
)
def test_agrees_with_the_definition(make_split, weight, sequences, window, min_count, max_per_item):
    options = {"window": window, "min_count": min_count, "max_per_item": max_per_item, "weight": weight}
    rows = rows_of(co_occurrence(make_split(sequences, 6), **options))
    expected = obvious(sequences, **options)
    assert {item: set(row) for item, row in rows.items()} == {
        item: set(row) for item, row in expected.items()
    }
    for item, row in rows.items():
        for neighbour, value in row.items():
            assert value == pytest.approx(expected[item][neighbour], abs=1e-5)


def test_window_by_hand(make_split):
    # Training part: 0 1 2 3 4.
    found = co_occurrence(make_split([[0, 1, 2, 3, 4, 5, 5]], 6), min_count=1, weight="decay")
    assert {item: sorted(row) for item, row in rows_of(found).items()} == {
        0: [1, 2, 3],
        1: [0, 2, 3, 4],
        2: [0, 1, 3, 4],
        3: [0, 1, 2, 4],
        4: [1, 2, 3],
    }
    # Item 0: 1, 1/2, 1/3, strongest first.
    assert found.neighbours[:3].tolist() == [1, 2, 3]
    np.testing.assert_allclose(found.weights[:3], [1, 0.3 + 0.7 * 0.25, 0.3], rtol=1e-6)


def test_equal_sums_of_decay_are_equal(make_split):
    # Item 0 has item 1 six times at distance 3, and item 2 twice at distance 1: both are 2, though not in floats.
    sequences = [[0, 3, 4, 1, 5, 5]] * 6 + [[0, 2]] * 2
    options = {"window": 3, "weight": "decay"}
    row = rows_of(co_occurrence(make_split(sequences, 6), **options))[0]
    assert row[1] == row[2]
    swapped = [[{1: 2, 2: 1}.get(item, item) for item in sequence] for sequence in sequences]
    for log in (sequences, swapped):  # of equals the lower id is kept
        rows = rows_of(co_occurrence(make_split(log, 6), **options, max_per_item=3))
        assert 1 in rows[0]
        assert 2 not in rows[0]


def test_sequences_do_not_run_into_each_other(make_split):
    found = co_occurrence(make_split([[0, 1], [2, 3]], 4), min_count=1, weight="decay")
    assert {item: set(row) for item, row in rows_of(found).items()} == {0: {1}, 1: {0}, 2: {3}, 3: {2}}


@pytest.mark.parametrize("weight", ["ppmi", "decay"])
def test_relation_is_symmetric_and_weights_in_range(random_split, weight):
    found = co_occurrence(random_split, min_count=1, max_per_item=1000, weight=weight)
    rows = rows_of(found)
    assert all(a in rows[b] for a, row in rows.items() for b in row)
    assert all(a not in row for a, row in rows.items())
    assert 0.3 <= found.weights.min() < found.weights.max() <= 1
    assert found.weights.dtype == np.float32


@pytest.mark.parametrize("weight", ["ppmi", "decay"])
def test_held_out_items_change_nothing(make_split, random_split, weight):
    log = random_split.log
    sequences = [log.items[a:b].tolist() for a, b in zip(log.offsets, log.offsets[1:], strict=False)]
    changed = [s[:-2] + [59 - item for item in s[-2:]] if len(s) >= 3 else s for s in sequences]
    assert changed != sequences
    before, after = (co_occurrence(make_split(s, 60), weight=weight) for s in (sequences, changed))
    assert len(before.neighbours) > 100
    for name in ("offsets", "neighbours", "weights"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_no_pairs_at_all(make_split):
    found = co_occurrence(make_split([[0], [1], []], 3))
    assert found.offsets.tolist() == [0, 0, 0, 0]
    index, weight = found.pairs_in_batch(torch.tensor([0, 1, 2, 3]))
    assert index.shape == (2, 0)
    assert weight.shape == (0,)


def test_pairs_in_batch_by_hand():
    # 0 -> 1 (0.4), 0 -> 2 (1.0), 1 -> 0 (0.9); 2 has no list, so (0, 2) is known from one side only.
    found = CoOccurrence(
        np.array([0, 2, 3, 3]), np.array([2, 1, 0]), np.array([1.0, 0.4, 0.9], dtype=np.float32)
    )
    index, weight = found.pairs_in_batch(torch.tensor([2, 0, 3, 1, 0], dtype=torch.int32))
    pairs = {
        tuple(sorted(pair)): value for pair, value in zip(index.T.tolist(), weight.tolist(), strict=True)
    }
    assert index.dtype == torch.int64
    assert weight.dtype == torch.float32
    assert index.shape[1] == len(pairs)
    assert pairs == pytest.approx({(0, 1): 1.0, (0, 4): 1.0, (1, 3): 0.9, (3, 4): 0.9})


@given(sequences=SEQUENCES, batch=st.lists(st.integers(0, 6), max_size=12))
def test_pairs_in_batch_agree_with_the_definition(make_split, sequences, batch):
    found = co_occurrence(make_split(sequences, 6), min_count=1, max_per_item=2)
    rows = rows_of(found)
    index, weight = found.pairs_in_batch(torch.tensor(batch, dtype=torch.int64))
    expected = {}
    for i, a in enumerate(batch):
        for j, b in enumerate(batch[:i]):
            both = [rows.get(a, {}).get(b), rows.get(b, {}).get(a)]
            if any(value is not None for value in both):
                expected[j, i] = max(value for value in both if value is not None)
    pairs = [tuple(sorted(pair)) for pair in index.T.tolist()]
    assert len(pairs) == len(set(pairs))
    assert dict(zip(pairs, weight.tolist(), strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [
        (torch.tensor([0, 7]), r"item_ids: expected ids in \[0, 6\], got 0 to 7"),
        (torch.tensor([-1, 2]), r"item_ids: expected ids in \[0, 6\], got -1 to 2"),
        (torch.tensor([[1]]), r"item_ids: expected integers \[M\], got torch.int64 \[1, 1\]"),
        (torch.tensor([1.0]), r"item_ids: expected integers \[M\], got torch.float32 \[1\]"),
    ],
)
def test_pairs_in_batch_refuses(make_split, item_ids, message):
    with pytest.raises(ValueError, match=message):
        co_occurrence(make_split([[0, 1]], 6)).pairs_in_batch(item_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"min_count": 0}, "min_count: expected at least 1, got 0"),
        ({"max_per_item": 0}, "max_per_item: expected at least 1, got 0"),
        ({"weight": "pmi"}, "weight: expected 'ppmi' or 'decay', got 'pmi'"),
    ],
)
def test_refuses(make_split, options, message):
    with pytest.raises(ValueError, match=message):
        co_occurrence(make_split([[0, 1]], 2), **options)

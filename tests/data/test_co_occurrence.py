import contextlib
import math
import os
import sys
from collections import defaultdict
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from h2rec.data import CoOccurrence, co_occurrence

SEQUENCES = st.lists(st.lists(st.integers(0, 5), max_size=10), min_size=1, max_size=8)


def rows_of(found: CoOccurrence) -> dict[int, dict[int, float]]:
    spans = zip(found.offsets, found.offsets[1:], strict=False)
    rows = {
        i: dict(zip(found.neighbours[a:b], found.weights[a:b], strict=True)) for i, (a, b) in enumerate(spans)
    }
    return {item: row for item, row in rows.items() if row}


IMPLEMENTATIONS = ["numpy"] if os.environ.get("H2REC_BUILD_EXT") == "0" else ["extension", "numpy"]


def using(implementation):
    if implementation == "extension":
        return contextlib.nullcontext()
    return mock.patch.dict(sys.modules, {"h2rec._catalog": None})  # as if it were not built


def obvious(sequences, window, min_count, max_per_item, weight, discount):
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
            rows[a][b] = strength / marginal[b] ** discount
    scaled = {}
    for a, row in rows.items():
        kept = dict(sorted(row.items(), key=lambda pair: (-round(pair[1], 9), pair[0]))[:max_per_item])
        low, high = min(kept.values()), max(kept.values())
        flat = high - low < 1e-12
        scaled[a] = {b: 0.7 if flat else 0.3 + 0.7 * (s - low) / (high - low) for b, s in kept.items()}
    return scaled


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight", ["ppmi", "decay"])
@given(
    sequences=SEQUENCES,
    options=st.fixed_dictionaries(
        {
            "window": st.integers(1, 4),
            "min_count": st.integers(1, 3),
            "max_per_item": st.integers(1, 6),
            "discount": st.sampled_from([0.0, 1.0]),
        }
    ),
)
def test_agrees_with_the_definition(make_split, implementation, weight, sequences, options):
    options = options | {"weight": weight}
    if options["discount"]:  # ties are then a matter of rounding: keep all
        options["max_per_item"] = 6
    with using(implementation):
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


@pytest.mark.parametrize("weight", ["ppmi", "decay"])
@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="the extension is not built")
def test_both_implementations_find_the_same(random_split, weight):
    found = []
    for implementation in IMPLEMENTATIONS:
        with using(implementation):
            found.append(co_occurrence(random_split, max_per_item=7, weight=weight, discount=0.5))
    for name in ("offsets", "neighbours"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    np.testing.assert_allclose(found[0].weights, found[1].weights, rtol=1e-6)


def test_a_discount_puts_popular_neighbours_last(make_split):
    sequences = [[0, 1, 2, 5, 5]] * 3 + [[1, 3, 5, 5], [1, 4, 5, 5]] * 5
    plain, discounted = (
        co_occurrence(make_split(sequences, 6), weight="decay", discount=discount) for discount in (0, 1)
    )
    assert rows_of(plain)[0][1] > rows_of(plain)[0][2]
    assert rows_of(discounted)[0][1] < rows_of(discounted)[0][2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_sums_of_decay_are_equal(make_split, implementation):
    with using(implementation):
        check_equal_sums_of_decay(make_split)


def check_equal_sums_of_decay(make_split):
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


def test_pairs_in_batch_of_items_with_equal_low_bits():
    """Item 1 has neighbours 5 and 5 + 2^16, of which the batch holds one."""
    far = 5 + (1 << 16)
    offsets = np.zeros(far + 2, dtype=np.int64)
    offsets[2:] = 2
    found = CoOccurrence(offsets, np.array([5, far]), np.array([0.5, 0.6], dtype=np.float32))
    for other, weight in ((5, 0.5), (far, 0.6)):
        index, weights = found.pairs_in_batch(torch.tensor([other, 1]))
        assert sorted(index.flatten().tolist()) == [0, 1]
        assert weights.tolist() == pytest.approx([weight])
    index, _ = found.pairs_in_batch(torch.tensor([5, 1, 1 + (1 << 16)]))
    assert index.shape == (2, 1)


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


def test_a_file_gives_back_what_was_saved(random_split, tmp_path):
    found = co_occurrence(random_split)
    found.save(tmp_path / "pairs.safetensors")
    loaded = CoOccurrence.load(tmp_path / "pairs.safetensors")
    for name in ("offsets", "neighbours", "weights"):
        np.testing.assert_array_equal(getattr(found, name), getattr(loaded, name))
    batch = torch.arange(60)
    torch.testing.assert_close(loaded.pairs_in_batch(batch), found.pairs_in_batch(batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"offsets": torch.tensor([0, 2, 1, 2])},
            "offsets must ascend from 0 to the number of neighbours, 2",
        ),
        ({"offsets": torch.tensor([0, 1, 1, 1])}, "offsets must ascend"),
        ({"neighbours": torch.tensor([1, 3])}, r"neighbours must lie in \[0, 3\)"),
        (
            {"neighbours": torch.tensor([1.0, 0.0])},
            r"neighbours must be torch.int64 \[n\], got torch.float32 \[2\]",
        ),
        ({"weights": torch.tensor([0.5])}, r"weights must be 2 numbers in \(0, 1\]"),
        ({"weights": torch.tensor([0.5, 1.5])}, r"weights must be 2 numbers in \(0, 1\]"),
        ({}, "expected a file with metadata .*, got {'format': 'other'}"),
    ],
)
def test_load_refuses(change, message, tmp_path):
    good = {
        "offsets": torch.tensor([0, 1, 2, 2]),
        "neighbours": torch.tensor([1, 0]),
        "weights": torch.tensor([0.5, 1.0]),
    }
    metadata = {"format": "h2rec.co_occurrence", "version": "1"} if change else {"format": "other"}
    save_file(good | change, tmp_path / "pairs.safetensors", metadata)
    with pytest.raises(ValueError, match=f"pairs.safetensors: {message}"):
        CoOccurrence.load(tmp_path / "pairs.safetensors")


def test_load_refuses_another_file(tmp_path):
    (tmp_path / "pairs").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="pairs: "):
        CoOccurrence.load(tmp_path / "pairs")


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
        ({"discount": -1.0}, "discount: expected a number of at least 0, got -1.0"),
        ({"weight": "pmi"}, "weight: expected 'ppmi' or 'decay', got 'pmi'"),
    ],
)
def test_refuses(make_split, options, message):
    with pytest.raises(ValueError, match=message):
        co_occurrence(make_split([[0, 1]], 2), **options)

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2rec import SemanticIds
from h2rec.tokenizers import ProductQuantizer, RQKMeans, add_level, resolve_collisions
from h2rec.tokenizers.collisions import _place_items, _place_items_in_python


def catalog(num_items=400, capacity_of_codes=(4, 8), seed=0):
    x = torch.randn(num_items, 6, generator=torch.Generator().manual_seed(seed))
    return x, RQKMeans(2, capacity_of_codes, num_iters=4).fit(x).tokenize(x)


def group_sizes(sids):
    return torch.unique(sids.codes, dim=0, return_counts=True)[1]


def test_next_best_codes_by_hand():
    codebook = torch.tensor([[0.0], [1.0], [5.0]])
    x = torch.tensor([[0.4], [0.1], [0.3], [4.9]])
    sids = SemanticIds(torch.tensor([[0], [0], [0], [2]]), codebooks=[codebook])
    result = resolve_collisions(sids, x)
    # Item 1 is nearest and stays; of the others the nearer one, 2, chooses first.
    assert result.sids.codes.flatten().tolist() == [0, 0, 1, 2]
    assert result.moved.tolist() == [2]
    assert (result.old_codes.tolist(), result.new_codes.tolist()) == ([0], [1])
    assert result.added_error == pytest.approx(0.7**2 - 0.3**2)
    assert result.unresolved == 1
    assert "1 of 4 items moved" in result.summary()
    assert resolve_collisions(sids, x, capacity=2).unresolved == 0


@pytest.mark.parametrize("capacity", [13, 14, 20])
def test_no_tuple_has_more_items_than_its_capacity(capacity):
    x, sids = catalog()
    assert group_sizes(sids).max() > capacity
    result = resolve_collisions(sids, x, capacity=capacity)
    sizes = group_sizes(result.sids)
    excess = int((sizes - capacity).clamp_min(0).sum())
    assert excess == result.unresolved
    changed = (result.sids.codes != sids.codes).any(1).nonzero().flatten()
    assert torch.equal(changed, result.moved)
    assert torch.equal(result.sids.codes[:, 0], sids.codes[:, 0])
    assert torch.equal(result.sids.codes[changed, 1], result.new_codes)
    assert torch.equal(sids.codes[changed, 1], result.old_codes)


def test_published_items_stay_and_take_their_places():
    x, sids = catalog()
    first = resolve_collisions(sids, x, capacity=15).sids
    new = torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
    longer = first.append(new)
    result = resolve_collisions(longer, new, capacity=20, num_published=400)
    assert torch.equal(result.sids.codes[:400], first.codes)
    assert len(result.moved) > 0
    assert result.moved.min() >= 400
    assert result.unresolved == 0
    of_tuple = torch.unique(result.sids.codes, dim=0, return_inverse=True)[1]
    taken_by_new = torch.unique(of_tuple[400:])
    assert group_sizes(result.sids)[taken_by_new].max() <= 20


@given(st.data())
def test_compiled_and_python_placement_agree_and_keep_the_capacity(data):
    num_codes, num_candidates = 5, data.draw(st.integers(1, 5))
    capacity = data.draw(st.integers(1, 3))
    prefix = st.integers(0, 3)
    orders = st.permutations(range(num_codes)).map(lambda codes: codes[:num_candidates])
    wishes = sorted(data.draw(st.lists(st.tuples(prefix, orders), max_size=25)), key=lambda wish: wish[0])
    settled = sorted(data.draw(st.lists(st.tuples(prefix, st.integers(0, 4)), max_size=15)))
    arrays = (
        np.array([prefix for prefix, _ in wishes], dtype=np.int64),
        np.array([codes for _, codes in wishes], dtype=np.int32).reshape(-1, num_candidates),
        np.array([prefix for prefix, _ in settled], dtype=np.int64),
        np.array([code for _, code in settled], dtype=np.int32),
    )
    choices = _place_items(*arrays, num_codes=num_codes, capacity=capacity)
    np.testing.assert_array_equal(choices, _place_items_in_python(*arrays, num_codes, capacity))
    loads = Counter(settled)
    before = Counter(settled)
    loads.update(
        (prefix, codes[choice])
        for (prefix, codes), choice in zip(wishes, choices.tolist(), strict=True)
        if choice >= 0
    )
    assert all(load <= max(capacity, before[place]) for place, load in loads.items())
    for (prefix, codes), choice in zip(wishes, choices.tolist(), strict=True):
        better = codes[:choice] if choice >= 0 else codes
        assert all(loads[prefix, code] >= capacity for code in better)  # nobody is passed over


def test_duplicates_fill_a_prefix_and_no_more():
    codebooks = torch.tensor([[[0.0], [10.0]], [[0.0], [1.0]]])
    x = torch.zeros(5, 1)
    sids = SemanticIds(torch.zeros(5, 2, dtype=torch.int32), codebooks=codebooks)
    result = resolve_collisions(sids, x)
    assert result.sids.codes[:, 1].tolist() == [0, 1, 0, 0, 0]
    assert (result.moved.tolist(), result.unresolved) == ([1], 3)


def test_a_counting_level_tells_all_items_apart_and_goes_on_after_load(tmp_path):
    x, sids = catalog()
    unique = add_level(sids)
    assert unique.stats().collision_rate == 0
    assert torch.equal(unique.codes[:, :2], sids.codes)
    assert unique.codebooks[2].abs().sum() == 0
    unique.save(tmp_path / "sids.safetensors")
    longer = SemanticIds.load(tmp_path / "sids.safetensors").append(x[:100])
    assert torch.equal(longer.codes[:400], unique.codes)
    assert torch.equal(longer.codes[400:, :2], sids.codes[:100])
    assert longer.stats().collision_rate == 0
    assert longer.append(x[:100]).stats().collision_rate == 0
    with pytest.raises(ValueError, match="already has a level that numbers"):
        add_level(unique)
    with pytest.raises(ValueError, match="there are no collisions"):
        resolve_collisions(unique, x)


def test_product_quantization_resolves_alike():
    x, _ = catalog()
    sids = ProductQuantizer(2, (4, 8), num_iters=4).fit(x).tokenize(x)
    capacity = int(group_sizes(sids).max()) - 2
    result = resolve_collisions(sids, x, capacity=capacity)
    assert len(result.moved) > 0
    assert group_sizes(result.sids).max() <= capacity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"num_published": 401}, r"num_published must lie in \[0, 400\], got 401"),
        (
            {"vectors": torch.zeros(3, 6)},
            "vectors must have 400 rows, one for each item that may move, got 3",
        ),
        ({"vectors": torch.zeros(400, 5)}, "vectors must have dimension 6, as the codebooks have, got 5"),
        ({"sids": SemanticIds(torch.zeros(3, 2, dtype=torch.int32))}, "have no codebooks"),
    ],
)
def test_bad_input(change, message):
    x, sids = catalog()
    with pytest.raises(ValueError, match=message):
        resolve_collisions(**{"sids": sids, "vectors": x} | change)

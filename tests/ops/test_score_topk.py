import sys

import pytest
import torch

from h2rec import ops


@pytest.mark.parametrize("tile_elements", [1, 37, 1 << 20])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_equals_a_sort_of_all_scores(k, tile_elements, monkeypatch, device, generator):
    monkeypatch.setattr(sys.modules["h2rec.ops.score_topk"], "_TILE_ELEMENTS", {device: tile_elements})
    queries = torch.randn(5, 8, generator=generator).to(device)
    items = torch.randn(50, 8, generator=generator).to(device)
    exclude = torch.randint(-1, 50, (5, 6), generator=generator).to(device)
    scores, indices = ops.score_topk(queries, items, k, exclude=exclude)
    expected = queries @ items.T
    for row, ids in enumerate(exclude.tolist()):
        expected[row, [i for i in ids if i >= 0]] = -torch.inf
    order = expected.argsort(1, descending=True)[:, :k]
    torch.testing.assert_close(scores, expected.gather(1, order))
    left = scores != -torch.inf
    assert torch.equal(indices[left], order[left])
    assert (indices[~left] == -1).all()


@pytest.mark.parametrize("tile_elements", [1, 37, 1 << 20])
@pytest.mark.parametrize("k", [1, 7, 49, 50, 60])
def test_of_equal_scores_the_lower_id(k, tile_elements, monkeypatch, device, generator):
    monkeypatch.setattr(sys.modules["h2rec.ops.score_topk"], "_TILE_ELEMENTS", {device: tile_elements})
    queries = torch.randint(-1, 2, (9, 3), generator=generator).float().to(device)
    items = torch.randint(-1, 2, (50, 3), generator=generator).float().to(device)
    scores, indices = ops.score_topk(queries, items, k)
    expected, order = (queries @ items.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores[:, :50], expected[:, :k])
    assert torch.equal(indices[:, :50], order[:, :k])


@pytest.mark.parametrize("tile_elements", [37, 1 << 20])
def test_more_queries_than_in_a_tile(tile_elements, monkeypatch, device, generator):
    queries, items = (torch.randn(n, 8, generator=generator).to(device) for n in (11, 100))
    exclude = torch.randint(-1, 100, (11, 6), generator=generator).to(device)
    expected = [
        ops.score_topk(query, items, 7, exclude=own)
        for query, own in zip(queries.split(1), exclude.split(1), strict=True)
    ]
    module = sys.modules["h2rec.ops.score_topk"]
    monkeypatch.setattr(module, "_TILE_ELEMENTS", {device: tile_elements})
    monkeypatch.setattr(module, "_QUERIES", 4)
    scores, indices = ops.score_topk(queries, items, 7, exclude=exclude)
    torch.testing.assert_close(scores, torch.cat([scores for scores, _ in expected]))
    assert torch.equal(indices, torch.cat([indices for _, indices in expected]))


@pytest.mark.parametrize("block", [1, 4, 32])
def test_many_blocks(block, monkeypatch, device, generator):
    """In both orders of the scores: what is kept changes in every tile, or after the first one never."""
    monkeypatch.setattr(sys.modules["h2rec.ops.score_topk"], "_BLOCK", block)
    monkeypatch.setattr(sys.modules["h2rec.ops.score_topk"], "_TILE_ELEMENTS", {device: 400})
    items = torch.randint(-40, 40, (1000, 1), generator=generator).float().to(device)
    queries = torch.tensor([[1.0], [-2.0]], device=device)
    for catalog in (items, items.sort(0).values, items.sort(0, descending=True).values):
        scores, indices = ops.score_topk(queries, catalog, 30)
        expected, order = (queries @ catalog.T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(scores, expected[:, :30])
        assert torch.equal(indices, order[:, :30])


@pytest.mark.parametrize("sizes", [[50], [0, 13, 1, 36, 0]])
def test_items_in_parts(sizes, device, generator):
    queries, items = (torch.randn(n, 8, generator=generator).to(device) for n in (5, 50))
    expected = ops.score_topk(queries, items, 6)
    scores, indices = ops.score_topk(queries, iter(items.split(sizes)), 6)
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(indices, expected[1])


def test_no_items_and_no_queries(device):
    vectors = torch.ones(3, 2, device=device)
    scores, indices = ops.score_topk(vectors, iter(()), 2)
    assert scores.eq(-torch.inf).all()
    assert indices.eq(-1).all()
    assert ops.score_topk(vectors[:0], vectors, 2)[1].shape == (0, 2)


def test_a_nan_is_shown_and_disturbs_no_other_row(device):
    queries = torch.tensor([[1.0], [float("nan")]], device=device)
    scores, indices = ops.score_topk(queries, torch.ones(5, 1, device=device), 2)
    assert indices[0].tolist() == [0, 1]
    assert scores[1].isnan().all()


def test_fewer_items_than_asked_for(device):
    scores, indices = ops.score_topk(torch.ones(2, 3, device=device), torch.ones(2, 3, device=device), 4)
    assert scores.tolist() == [[3, 3, -torch.inf, -torch.inf]] * 2
    assert sorted(indices[0, :2].tolist()) == [0, 1]
    assert indices[:, 2:].eq(-1).all()


@pytest.mark.parametrize(
    ("queries", "items", "k", "exclude", "error", "message"),
    [
        (torch.ones(3), torch.ones(4, 3), 1, None, ValueError, r"queries must have shape \[B, D\]"),
        (torch.ones(2, 3).int(), torch.ones(4, 3), 1, None, TypeError, "queries must be a floating-point"),
        (torch.ones(2, 3), torch.ones(4, 5), 1, None, ValueError, "items has dimension 5, but queries has 3"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3).half(),
            1,
            None,
            TypeError,
            "items is torch.float16, but queries is",
        ),
        (torch.ones(2, 3), [torch.ones(4)], 1, None, ValueError, r"items must have shape \[N, D\]"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, None, ValueError, "k must be at least 1, got 0"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            1,
            torch.ones(3, 1).int(),
            ValueError,
            r"exclude must have shape \[2, M\]",
        ),
        (torch.ones(2, 3), torch.ones(4, 3), 1, torch.ones(2, 1), TypeError, "exclude must be an integer"),
    ],
)
def test_bad_input(queries, items, k, exclude, error, message):
    with pytest.raises(error, match=message):
        ops.score_topk(queries, items, k, exclude=exclude)

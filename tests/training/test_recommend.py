import sys

import numpy as np
import pytest
import torch

from h2rec.training import load_model
from h2rec.training.recommend import item_history, recommend, user_history


@pytest.fixture(scope="module", params=["sum", "h2rec"])
def trained(request, finished_run, device):
    model, config, catalog, _ = load_model(finished_run, request.param)
    return model.to(device), config, catalog


def best_by_hand(model, catalog, history, hidden, k):
    """The whole catalog sorted, for one user alone: raw ids and scores."""
    device = next(model.parameters()).device
    latest = torch.tensor(history[-model.max_length :], device=device)[None]
    with torch.no_grad():
        user = model.encode(latest, torch.tensor([latest.shape[1]], device=device))[0, -1]
        scores = (model.item_vectors() @ user).cpu()
    scores[hidden] = -torch.inf
    order = scores.argsort(descending=True)[:k].tolist()
    return [catalog.ids[item] for item in order], scores[order]


@pytest.mark.parametrize("exclude", [True, False], ids=["without history", "with history"])
def test_best_items(exclude, trained):
    model, _, catalog = trained
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 60, length) for length in (1, 5, 8, 30)]  # up to more than it reads
    results = recommend(model, catalog, histories, k=7, exclude_history=exclude)
    assert len(results) == 4
    for history, result in zip(histories, results, strict=True):
        hidden = history if exclude else []
        items, scores = best_by_hand(model, catalog, history, hidden, 7)
        assert [recommendation.item for recommendation in result] == items
        assert [recommendation.title for recommendation in result] == [f"Item {item}" for item in items]
        torch.testing.assert_close(torch.tensor([r.score for r in result]), scores, rtol=1e-5, atol=1e-5)


def test_fewer_where_there_are_no_more(trained):
    model, _, catalog = trained
    ((*some,), (*all_but_one,)) = recommend(model, catalog, [np.arange(55), np.array([4])], k=100)
    assert sorted(recommendation.item for recommendation in some) == [f"i{item}" for item in range(55, 60)]
    assert len(all_but_one) == 59


def test_the_vectors_of_a_large_catalog_are_never_together(trained, monkeypatch):
    model, _, catalog = trained
    histories = [np.array([3, 4]), np.array([17])]
    expected = recommend(model, catalog, histories, k=20)
    sizes = []
    item_vectors = model.item_vectors
    monkeypatch.setattr(sys.modules["h2rec.models.base"], "_PART_ITEMS", {"cpu": 7, "cuda": 7})
    monkeypatch.setattr(model, "item_vectors", lambda ids: sizes.append(len(ids)) or item_vectors(ids))
    assert [[r.item for r in user] for user in recommend(model, catalog, histories, k=20)] == [
        [r.item for r in user] for user in expected
    ]
    assert sizes == [7] * 8 + [4]


def test_history_of_a_user_is_all_of_the_log(trained):
    _, config, catalog = trained
    from_log = user_history(config, catalog, "u04")
    # u04 walks in steps of 2; the held-out items are known by now.
    assert len(from_log) >= 3
    assert (np.diff(from_log) % 60 == 2).all()
    with pytest.raises(ValueError, match="no user 'nobody' among the 90 users of the log"):
        user_history(config, catalog, "nobody")


def test_history_of_raw_ids(trained):
    _, _, catalog = trained
    assert item_history(catalog, ["i07", "i03", "i07"]).tolist() == [7, 3, 7]
    with pytest.raises(ValueError, match="items: expected at least one item, got none"):
        item_history(catalog, [])
    with pytest.raises(ValueError, match="not among the 60 items of the catalog: 'sock'"):
        item_history(catalog, ["i07", "sock"])


def test_refuses_nothing_to_go_by(trained):
    model, _, catalog = trained
    for histories in ([], [np.array([3]), np.array([], dtype=np.int64)]):
        with pytest.raises(ValueError, match="histories: expected one item or more in each, got none"):
            recommend(model, catalog, histories)
    with pytest.raises(ValueError, match="k"):
        recommend(model, catalog, [np.array([3])], k=0)

import math

import numpy as np
import polars as pl
import pytest
import torch

from h2rec.data import InteractionLog, ItemCatalog, Split, leave_one_out
from h2rec.training.losses import full_softmax, sampled_softmax
from h2rec.training.shared_negatives import SharedNegatives

NUM_ITEMS, NUM_USERS = 30, 25


@pytest.fixture(scope="module")
def split() -> Split:
    """Users with 1 to 12 items, low ids more often than high ones."""
    rng = np.random.default_rng(0)
    sequences = [
        np.minimum(rng.geometric(0.15, rng.integers(1, 13)), NUM_ITEMS) - 1 for _ in range(NUM_USERS)
    ]
    offsets = np.cumsum([0, *map(len, sequences)])
    catalog = ItemCatalog(pl.Series(range(NUM_ITEMS)))
    return leave_one_out(
        InteractionLog(pl.Series(range(NUM_USERS)), catalog, offsets, np.concatenate(sequences))
    )


@pytest.mark.parametrize("num_negatives", [1, 7])
def test_says_how_often_an_item_is_expected(num_negatives, split, device):
    negatives = SharedNegatives(split, num_negatives, torch.device(device))
    draws = 1_500
    counts, said = np.zeros(NUM_ITEMS), np.full(NUM_ITEMS, math.nan)
    for _ in range(draws):
        drawn = negatives.draw(torch.arange(1))
        items = drawn.items.cpu().numpy()
        assert len(items) == num_negatives
        np.add.at(counts, items, 1)
        said[items] = drawn.log_expected.exp().cpu().numpy()
    assert said.sum() == pytest.approx(
        num_negatives, rel=1e-5
    )  # of the whole catalog: all of it can be drawn
    assert (np.abs(counts - draws * said) < 5 * np.sqrt(draws * said)).all()
    if num_negatives > 1:
        popularity = split.train_counts()
        assert said[popularity.argmax()] > 2 * said[popularity.argmin()]


def test_knows_what_is_a_users_own(split, device):
    negatives = SharedNegatives(split, 40, torch.device(device))
    users = torch.tensor([3, 0, 17, 3])
    drawn = negatives.draw(users.to(device))
    offsets = split.train_offsets
    own = [set(split.train_items[offsets[user] : offsets[user + 1]].tolist()) for user in users.tolist()]
    expected = [[item in items for item in drawn.items.tolist()] for items in own]
    assert any(map(any, expected))
    assert drawn.is_own.tolist() == expected


def test_the_loss_is_that_over_the_catalog_on_average(split, generator):
    """With a sample large enough, nothing is left of the preference for popular items."""
    users, items = torch.randn(6, 4, generator=generator), torch.randn(NUM_ITEMS, 4, generator=generator)
    targets = torch.tensor([0, 1, 2, 3, 28, 29])
    drawn = SharedNegatives(split, 200_000, torch.device("cpu")).draw(torch.arange(6))
    is_target = drawn.items == targets[:, None]  # counted once already
    loss = sampled_softmax(users, items[targets], items[drawn.items], drawn.log_expected, is_target)
    torch.testing.assert_close(loss, full_softmax(users, items, targets), rtol=5e-3, atol=0)

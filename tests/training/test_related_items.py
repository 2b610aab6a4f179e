import numpy as np
import polars as pl
import pytest
import torch

from h2rec import SemanticIds
from h2rec.data import InteractionLog, ItemCatalog, leave_one_out
from h2rec.models import build_model
from h2rec.training import TrainConfig, related_items
from h2rec.training.module import Recommender
from h2rec.training.related_items import RelatedItems

N = 40


def split_of(sequences, num_items=N):
    """Users who train on these items, and two more that are held out."""
    sequences = [[*sequence, 0, 0] for sequence in sequences]
    offsets = np.cumsum([0, *map(len, sequences)])
    users, catalog = pl.Series(range(len(sequences))), ItemCatalog(pl.Series(range(num_items)))
    return leave_one_out(InteractionLog(users, catalog, offsets, np.concatenate(sequences)))


def random_split(num_users=30):
    rng = np.random.default_rng(0)
    return split_of([rng.integers(1, N, rng.integers(1, 20)).tolist() for _ in range(num_users)])


def drawn_from(related, item, times=4000):
    """Which items are drawn for one, and how often."""
    return torch.unique(related.draw(torch.full((times // 2,), item), 2), return_counts=True)


def audience_cosines(split):
    """[N, N] fp64. Of so few users no direction is left out, and the rows of the matrix have the cosines."""
    chosen = torch.zeros(split.num_items, split.num_users, dtype=torch.float64)
    for user in range(split.num_users):
        chosen[split.train_items[split.train_offsets[user] : split.train_offsets[user + 1]], user] = 1
    chosen *= chosen.sum(0) > 1
    chosen *= (chosen.sum(0) * chosen.sum(1, keepdim=True)).clamp(min=1).rsqrt()
    return torch.cosine_similarity(chosen[:, None], chosen, dim=2)


def check_nearest(related, likeness):
    likeness = likeness.clone().fill_diagonal_(-2)
    for item in range(len(likeness)):
        items, counts = drawn_from(related, item)
        assert len(items) == 10
        others = torch.ones(len(likeness), dtype=torch.bool).index_fill(0, items, False)
        assert likeness[item, items].min() >= likeness[item, others].max() - 1e-5  # ties either way
        assert counts.min() > 0.6 * counts.max()


def test_with_content_kinds_are_the_nearest_by_content_and_audience(generator):
    content = torch.randn(N, 6, generator=generator)
    content[7] = 3 * content[8]  # the same direction
    split = random_split()
    related = RelatedItems(SemanticIds(torch.zeros(N, 1, dtype=torch.int64)), split, 0.3, content)
    of_content = torch.cosine_similarity(content[:, None], content, dim=2)
    check_nearest(related, of_content + audience_cosines(split))


def test_without_content_common_codes_take_its_place(generator, monkeypatch):
    monkeypatch.setattr(related_items, "_TILE", 7)
    codes = torch.randint(3, (N, 4), generator=generator)
    split = random_split()
    of_codes = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            differ = (codes[i] != codes[j]).nonzero().flatten().tolist()
            of_codes[i, j] = (differ[0] if differ else 4) / 4
    check_nearest(RelatedItems(SemanticIds(codes), split, 0.3), of_codes + audience_cosines(split))


def test_audiences_that_never_met_are_alike_by_those_who_met_both():
    """Users of 1, 2, 3 and of 3, 4, 5 share item 3; those of 6 .. 9 none with them. Item 0 nobody chose."""
    split = split_of([[1, 2, 3], [1, 2, 3], [3, 4, 5], [3, 4, 5], [6, 7, 8, 9]], 10)
    vectors = related_items._audiences(split)
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([0.0] + [1] * 9))
    torch.testing.assert_close(vectors[6:] @ vectors[1:6].T, torch.zeros(4, 5), atol=1e-5, rtol=0)
    blurred = torch.nn.functional.normalize(vectors[:, :2], dim=1)  # fewer directions than users who differ
    assert blurred[1] @ blurred[4] > 0.9
    torch.testing.assert_close(vectors, related_items._audiences(split), atol=0, rtol=0)


def test_users_of_one_item_take_no_direction():
    split = split_of([[1, 2, 3], [2, 3, 4], [5, 6, 7], [6, 7, 8]], 109)
    more = split_of([[1, 2, 3], [2, 3, 4], [5, 6, 7], [6, 7, 8], *([item] for item in range(9, 109))], 109)
    vectors, expected = related_items._audiences(more), related_items._audiences(split)
    torch.testing.assert_close(vectors @ vectors.T, expected @ expected.T)


def test_large_catalogs_are_divided_by_prefixes(monkeypatch):
    """(0, 0, *) has five items, (0, 1, *) two, (1, *, *) five, (2, *, *) one: the last and the two share nothing."""
    monkeypatch.setattr(related_items, "FULL_SOFTMAX_MAX_ITEMS", 12)
    codes = [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0), (0, 1, 1)]
    codes += [(1, i, 0) for i in range(5)] + [(2, 0, 0)]
    codes = torch.tensor(codes)
    shuffle = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    sids = SemanticIds(codes[shuffle], codebook_sizes=(3, 5, 4))
    related = RelatedItems(sids, split_of([[0]], 13), 0.3, torch.randn(13, 3))
    kinds = [{0, 1, 2, 3, 4}] * 5 + [{5, 6}] * 2 + [{7, 8, 9, 10, 11}] * 5 + [{12}]
    for item, original in enumerate(shuffle.tolist()):
        items, counts = drawn_from(related, item)
        assert set(shuffle[items].tolist()) == kinds[original]
        assert counts.min() > 0.8 * counts.max()


def test_ten_items_have_not_ten_others():
    related = RelatedItems(SemanticIds(torch.zeros(10, 1, dtype=torch.int64)), split_of([[0]], 10), 0.3)
    items, _ = drawn_from(related, 4)
    assert items.tolist() == list(range(10))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_rarer_a_target_the_more_its_kind_gets(share):
    split = split_of([[1, 2, 3], [2, 3, 3], [3, 3]], 4)  # 0, 1, 2 and 5 times: the mean is 2
    related = RelatedItems(SemanticIds(torch.zeros(4, 1, dtype=torch.int64)), split, share)
    k = share / (1 - share) * 2
    expected = torch.tensor([share, k / (k + 5), 1.0, k / (k + 1)])
    torch.testing.assert_close(related.shares(torch.tensor([2, 3, 0, 1])), expected)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_are_given_where_the_config_smooths_and_only_there(share):
    sids = SemanticIds(torch.zeros(N, 1, dtype=torch.int64))
    split = random_split()
    config = TrainConfig(interactions="i.parquet", sids="s.safetensors", target_smoothing=share)
    given = None if share else RelatedItems(sids, split, 0.3)
    expected = "RelatedItems" if share else "None"
    with pytest.raises(
        ValueError, match=rf"related_items: expected {expected} for model 'hash' with .* {share}, got"
    ):
        Recommender("hash", build_model("hash", sids, dim=8), config, split, related_items=given)

import pytest
import torch

from h2rec import SemanticIds
from h2rec.training import related_items
from h2rec.training.related_items import RelatedItems


def drawn_from(related, item, times=4000):
    """Which items are drawn for one, and how often."""
    return torch.unique(related.draw(torch.full((times // 2,), item), 2), return_counts=True)


def test_without_content_kinds_are_prefixes():
    """(0, 0, *) has five items, (0, 1, *) two, (1, *, *) five, (2, *, *) one: the last and the two share nothing."""
    codes = [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0), (0, 1, 1)]
    codes += [(1, i, 0) for i in range(5)] + [(2, 0, 0)]
    codes = torch.tensor(codes)
    shuffle = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    related = RelatedItems(SemanticIds(codes[shuffle], codebook_sizes=(3, 5, 4)))
    kinds = [{0, 1, 2, 3, 4}] * 5 + [{5, 6}] * 2 + [{7, 8, 9, 10, 11}] * 5 + [{12}]
    for item, original in enumerate(shuffle.tolist()):
        items, counts = drawn_from(related, item)
        assert set(shuffle[items].tolist()) == kinds[original]
        assert counts.min() > 0.8 * counts.max()


def test_with_content_kinds_are_the_nearest(generator):
    content = torch.randn(40, 6, generator=generator)
    content[7] = 3 * content[8]  # the same direction
    related = RelatedItems(SemanticIds(torch.zeros(40, 1, dtype=torch.int64)), content)
    for item in range(40):
        cosines = torch.cosine_similarity(content[item], content, dim=1)
        cosines[item] = -2
        items, counts = drawn_from(related, item)
        assert set(items.tolist()) == set(cosines.topk(10).indices.tolist())
        assert counts.min() > 0.6 * counts.max()


@pytest.mark.parametrize("num_items", [10, 31])
def test_catalogs_that_are_not_compared(num_items, monkeypatch):
    """Ten items have not ten others; 31 are too many here."""
    monkeypatch.setattr(related_items, "FULL_SOFTMAX_MAX_ITEMS", 30)
    related = RelatedItems(
        SemanticIds(torch.zeros(num_items, 1, dtype=torch.int64)), torch.randn(num_items, 3)
    )
    items, _ = drawn_from(related, 4)
    assert items.tolist() == list(range(num_items))

import pytest
import torch

from h2rec import SemanticIds
from h2rec.layers import SemanticEmbedding
from h2rec.tokenizers import ProductQuantizer


@pytest.fixture
def vectors():
    return torch.randn(300, 7, generator=torch.Generator().manual_seed(0))


def test_codes_are_the_nearest_codewords_of_each_part(vectors):
    sids = ProductQuantizer(3, (8, 4, 5), num_iters=4).fit(vectors).tokenize(vectors)
    for part, columns in enumerate((slice(0, 2), slice(2, 4), slice(4, 7))):
        book = sids.codebooks[part]
        nearest = torch.cdist(vectors[:, columns], book[:, columns]).argmin(1)
        assert (nearest == sids.codes[:, part]).float().mean() > 0.99
        outside = book.clone()
        outside[:, columns] = 0
        assert outside.abs().sum() == 0
    assert sids.provenance["method"] == "PQ"


def test_a_layer_starts_from_the_reconstruction(vectors):
    sids = ProductQuantizer(3, 16).fit(vectors).tokenize(vectors)
    reconstructed = SemanticEmbedding(sids, 7)(torch.arange(300))
    assert (reconstructed - vectors).square().mean() < 0.3 * vectors.square().mean()


def test_append_save_load_and_streams(vectors, tmp_path):
    tokenizer = ProductQuantizer(2, 8, num_iters=3, batch_size=64).fit(lambda: vectors.split(50))
    sids = tokenizer.tokenize(vectors[:200])
    sids.save(tmp_path / "sids.safetensors")
    longer = SemanticIds.load(tmp_path / "sids.safetensors").append(vectors[200:])
    assert torch.equal(longer.codes, tokenizer.tokenize(lambda: vectors.split(70)).codes)


def test_progress(vectors):
    seen, encoded = [], []
    tokenizer = ProductQuantizer(2, 8, num_iters=4, batch_size=100)
    tokenizer.fit(vectors, progress=lambda part, step, error: seen.append(part))
    tokenizer.tokenize(vectors, progress=encoded.append)
    assert set(seen) == {0, 1}
    assert [progress.done for progress in encoded] == [100, 200, 300]
    assert encoded[-1].total == 300
    assert encoded[-1].seconds_left == 0
    assert encoded[0].rows_per_second > 0


def test_bad_input(vectors):
    with pytest.raises(ValueError, match="num_parts must be at least 1, got 0"):
        ProductQuantizer(0)
    with pytest.raises(ValueError, match=r"num_parts = 2 positive numbers, got \(4,\)"):
        ProductQuantizer(2, (4,))
    with pytest.raises(ValueError, match="at least num_parts = 9 dimensions, got 7"):
        ProductQuantizer(9, 4).fit(vectors)
    with pytest.raises(ValueError, match="vectors must have rows, got none"):
        ProductQuantizer(2, 4).fit(vectors[:0])
    with pytest.raises(RuntimeError, match="fit must be called before tokenize"):
        ProductQuantizer(2, 4).tokenize(vectors)

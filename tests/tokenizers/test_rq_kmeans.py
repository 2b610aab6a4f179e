import pytest
import torch

from h2rec import SemanticIds, ops
from h2rec.testing import assert_nearest_codes
from h2rec.tokenizers import RQKMeans


@pytest.fixture
def vectors():
    return torch.randn(300, 6, generator=torch.Generator().manual_seed(0))


def test_tokens_are_the_nearest_codewords(vectors, tmp_path):
    sids = RQKMeans(3, (8, 4, 5), num_iters=5).fit(vectors).tokenize(vectors)
    assert sids.codebook_sizes == (8, 4, 5)
    quantized, codes = ops.residual_quantize(vectors, sids.codebooks)
    assert torch.equal(codes, sids.codes)
    assert_nearest_codes(vectors, sids.codebooks, quantized, sids.codes)
    assert sids.provenance["method"] == "RQ-KMeans"
    assert sids.provenance["seed"] == "0"
    sids.save(tmp_path / "sids.safetensors")
    assert torch.equal(SemanticIds.load(tmp_path / "sids.safetensors").codes, sids.codes)


def test_half_precision_and_streams_give_the_same_codes(vectors):
    half = vectors.half()
    tokenizer = RQKMeans(2, 8, num_iters=3, batch_size=64).fit(half.float())
    expected = tokenizer.tokenize(half.float()).codes
    for source in (half, half.numpy(), lambda: iter(half.split(50))):
        assert torch.equal(tokenizer.tokenize(source).codes, expected)


def test_beam_search_lowers_the_error(vectors):
    tokenizer = RQKMeans(3, 8, num_iters=5).fit(vectors)

    def error(beam_size):
        sids = tokenizer.tokenize(vectors, beam_size=beam_size)
        reconstructed = sum(
            book[codes.long()] for book, codes in zip(sids.codebooks, sids.codes.T, strict=True)
        )
        return (vectors - reconstructed).square().mean()

    assert error(4) < error(1)


def test_appended_items_get_the_codes_of_the_tokenizer(vectors):
    tokenizer = RQKMeans(2, 8, num_iters=3).fit(vectors[:200])
    sids = tokenizer.tokenize(vectors[:200]).append(vectors[200:])
    assert torch.equal(sids.codes, tokenizer.tokenize(vectors).codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "num_levels must be at least 1, got 0"),
        ((2, 0), "codebook_size must be positive"),
        ((2, (4, 4, 4)), r"num_levels = 2 positive numbers, got \(4, 4, 4\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RQKMeans(*arguments)


def test_tokenize_before_fit(vectors):
    with pytest.raises(RuntimeError, match="fit must be called before tokenize"):
        RQKMeans(2, 4).tokenize(vectors)


def test_vectors_of_another_dimension(vectors):
    tokenizer = RQKMeans(2, 4, num_iters=1).fit(vectors)
    with pytest.raises(ValueError, match="vectors must have dimension 6, as the codebooks have, got 3"):
        tokenizer.tokenize(vectors[:, :3])

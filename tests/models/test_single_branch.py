import pytest
import torch

from h2rec import SemanticIds
from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding
from h2rec.models import SingleBranch, base
from h2rec.models.base import scale_tables


def test_is_the_backbone_over_scaled_embeddings_and_positions(device):
    torch.manual_seed(0)
    model = SingleBranch(HashEmbedding(20, 8, padding_idx=20), max_length=6).to(device).eval()
    items, lengths = torch.randint(20, (2, 5)).to(device), torch.tensor([5, 3], device=device)
    vectors = model.embedding(items) * 8**0.5 + model.input.position.weight[:5]
    torch.testing.assert_close(model.encode(items, lengths), model.backbone(vectors))


def test_sparse_gradients_of_the_hash_table(device):
    model = SingleBranch(HashEmbedding(20, 8, padding_idx=20, sparse=True), max_length=6).to(device)
    model.encode(torch.tensor([[3, 4, 20]], device=device), torch.tensor([2], device=device)).sum().backward()
    assert model.embedding.hash_table.grad.is_sparse


@pytest.mark.parametrize("part", [1, 7, 1 << 24], ids=lambda part: f"{part} numbers at a time")
def test_scale_tables_keeps_the_codebooks_proportions(part, monkeypatch):
    monkeypatch.setattr(base, "_SUM_ELEMENTS", part)
    sids = SemanticIds(torch.zeros(5, 2, dtype=torch.int32), codebook_sizes=(3, 4))
    embedding = HarmonizedEmbedding(sids, 4, fusion="none", pooling="levels", padding_idx=5)
    codebooks = list(embedding.codebooks)
    with torch.no_grad():
        codebooks[0].normal_().mul_(10)
        codebooks[1].normal_()
        embedding.hash_table.normal_()
    before = [codebook.clone() for codebook in codebooks]
    scale_tables(embedding)
    flat = torch.cat([codebook.detach().flatten() for codebook in codebooks])
    assert flat.square().mean().sqrt().item() == pytest.approx(0.02)
    assert embedding.hash_table.square().mean().sqrt().item() == pytest.approx(0.02)
    factors = torch.cat([(new / old).flatten() for new, old in zip(codebooks, before, strict=True)])
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))


def test_scale_tables_leaves_other_parameters():
    sids = SemanticIds(torch.zeros(5, 2, dtype=torch.int32), codebook_sizes=(3, 3))
    embedding = HarmonizedEmbedding(sids, 4, fusion="gate", padding_idx=5)
    before = embedding.gate.weight.clone()
    SingleBranch(embedding)
    assert torch.equal(embedding.gate.weight, before)


def test_refuses_unfit_embeddings():
    with pytest.raises(ValueError, match=r"embedding\.padding_idx must be num_embeddings=20, got None"):
        SingleBranch(HashEmbedding(20, 8))
    sids = SemanticIds(torch.zeros(5, 2, dtype=torch.int32), codebook_sizes=(3, 3))
    embedding = HarmonizedEmbedding(sids, 4, fusion="none", padding_idx=5)
    with pytest.raises(
        ValueError, match="embedding must return one vector per item, got fusion='none', pooling='sum'"
    ):
        SingleBranch(embedding)
    for pooling in ("levels", "concat"):
        with pytest.raises(ValueError, match=f"got fusion=None, pooling='{pooling}'"):
            SingleBranch(SemanticEmbedding(sids, 4, pooling=pooling, padding_idx=5))
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        SingleBranch(HashEmbedding(20, 8, padding_idx=20), max_length=0)

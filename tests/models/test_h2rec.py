import pytest
import torch

from h2rec import SemanticIds
from h2rec.data import SequenceBatch
from h2rec.models import H2Rec

NUM_ITEMS = 30


def make_sids(num_levels=4, sizes=None):
    sizes = sizes or (5,) * num_levels
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(size, (NUM_ITEMS,), generator=generator) for size in sizes]
    return SemanticIds(torch.stack(codes, 1), codebook_sizes=sizes)


@pytest.fixture
def make_model(device):
    def make(sids=None, **settings):
        torch.manual_seed(0)
        model = H2Rec(sids or make_sids(), **{"dim": 8, "max_length": 10, **settings})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.to(device)

    return make


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([6, 2, 5])
    sequences = torch.randint(NUM_ITEMS, (3, 7), generator=generator)
    padded = torch.arange(6) >= lengths[:, None]
    return SequenceBatch(
        user_ids=torch.arange(3).to(device),
        item_ids=sequences[:, :-1].masked_fill(padded, NUM_ITEMS).to(device),
        lengths=lengths.to(device),
        targets=sequences[:, 1:].masked_fill(padded, NUM_ITEMS).to(device),
    )


class Pairs:
    """Items i and i + 1 co-occur with weight 0.5."""

    def pairs_in_batch(self, item_ids):
        left, right = (item_ids[:, None] + 1 == item_ids[None]).nonzero().T
        return torch.stack((left, right)), torch.full((len(left),), 0.5, device=item_ids.device)


ALL_PARTS = {"mixing": "residual_attention", "alignment_weight": 0.1, "granularity_weight": 0.1}


@pytest.mark.parametrize("mixing", ["sum", "attention", "residual_attention"])
@pytest.mark.parametrize("fusion", ["sum", "mean", "adaptive"])
def test_is_two_branches(mixing, fusion, make_model, batch):
    model = make_model(mixing=mixing, fusion=fusion).eval()
    levels, hashed = item_parts(model, batch.item_ids)
    semantic = levels.mean(-2) if fusion == "mean" else levels.sum(-2)
    if fusion == "adaptive":
        semantic = model.fusion(levels)
    position = model.input.position.weight[:6]
    if mixing == "sum":
        hash_sequence = semantic_sequence = (hashed + semantic) * 8**0.5 + position
    else:
        hash_input = hashed * 8**0.5 + position
        semantic_input = semantic * 8**0.5 + position
        level_input = levels * 8**0.5 + position[:, None]
        hash_sequence = model.hash_attention(level_input, hash_input)[0]
        semantic_sequence = model.semantic_attention(hash_input, semantic_input)
    if mixing == "residual_attention":
        hash_sequence, semantic_sequence = hash_sequence + hash_input, semantic_sequence + semantic_input
    expected = torch.cat((model.hash_backbone(hash_sequence), model.semantic_backbone(semantic_sequence)), -1)
    torch.testing.assert_close(model.encode(batch.item_ids, batch.lengths), expected)
    items = torch.cat((hashed, semantic), -1)
    torch.testing.assert_close(model.item_vectors(batch.item_ids), items)


def item_parts(model, item_ids):
    """Levels [*, L, D] and hash vectors [*, D], by plain indexing; zeros for padding."""
    real = item_ids < NUM_ITEMS
    codes = model.embedding.codes[item_ids.clamp(max=NUM_ITEMS - 1)].long()
    levels = torch.stack(
        [book[codes[..., level]] for level, book in enumerate(model.embedding.codebooks)], -2
    )
    hashed = model.embedding.hash_table[item_ids.clamp(max=NUM_ITEMS - 1)]
    return levels * real[..., None, None], hashed * real[..., None]


def test_alignment_is_over_the_distinct_targets(make_model, batch, device):
    model = make_model(alignment_weight=0.3, min_shared_codes=2).eval()
    items = sorted(set(batch.targets.flatten().tolist()) - {NUM_ITEMS})
    levels, hashed = item_parts(model, torch.tensor(items, device=device))
    h = torch.nn.functional.normalize(hashed, dim=1)
    s = torch.nn.functional.normalize(levels.sum(1), dim=1)
    e = (h @ s.T / 0.5).exp()
    codes = make_sids().codes[items]
    for co_occurrence in (None, Pairs()):
        weights = torch.zeros(len(items), len(items), device=device)
        for i, a in enumerate(items):
            for j, b in enumerate(items):
                if co_occurrence is not None and abs(a - b) == 1:
                    weights[i, j] = 0.5
                if i == j or (codes[i] == codes[j]).sum() >= 2:
                    weights[i, j] = 1
        rows, columns = -((weights * e).sum(1) / e.sum(1)).log(), -((weights * e).sum(0) / e.sum(0)).log()
        _, losses = model.training_outputs(batch, co_occurrence)
        torch.testing.assert_close(losses["alignment"], 0.3 * (rows.mean() + columns.mean()) / 2)


def test_masked_granularity_is_over_the_last_positions(make_model, batch):
    model = make_model(mixing="attention", granularity_weight=0.3).eval()
    levels, hashed = model.embedding(batch.item_ids)
    level_input, hash_input = model.input(levels), model.input(hashed)
    _, gates = model.hash_attention(level_input, hash_input)
    masked_users, full_users = [], []
    for row, length in enumerate(batch.lengths.tolist()):
        gate = gates[row, length - 1]
        sequence = level_input[row, :length]
        masked = sequence.clone()
        for level in gate.argsort()[:2]:
            masked[:, level] = model.masked_granularity.mask_vectors[level]
        for users, vectors in ((masked_users, masked), (full_users, sequence)):
            mixed = (vectors * gate[:, None]).sum(1)
            users.append(model.semantic_backbone(mixed[None])[0, -1])
    expected = 0.3 * model.masked_granularity(torch.stack(masked_users), torch.stack(full_users))
    torch.testing.assert_close(model.training_outputs(batch)[1]["granularity"], expected)


@pytest.mark.parametrize("settings", [{}, ALL_PARTS], ids=["default", "all parts"])
def test_training_looks_up_once(settings, monkeypatch, make_model, batch):
    model = make_model(**settings)
    calls = []
    forward = model.embedding.forward
    monkeypatch.setattr(model.embedding, "forward", lambda ids: calls.append(ids) or forward(ids))
    model.training_outputs(batch)
    assert len(calls) == 1


def test_alignment_has_a_bound(make_model, batch):
    model = make_model(alignment_weight=0.1, max_aligned_items=4)
    items = [model._items_to_align(batch.targets) for _ in range(20)]
    assert all(len(subset) == len(subset.unique()) == 4 for subset in items)
    assert not all(torch.equal(items[0], subset) for subset in items)
    assert NUM_ITEMS not in torch.cat(items)
    _, losses = model.training_outputs(batch, Pairs())
    assert torch.isfinite(losses["alignment"])


def test_default_positives_share_all_codes_but_one(make_model):
    def shared(num_levels, **settings):
        return make_model(make_sids(num_levels), alignment_weight=0.1, **settings).alignment.min_shared_codes

    assert (shared(4), shared(1), shared(4, min_shared_codes=4)) == (3, 1, 4)


def test_losses_are_those_asked_for(make_model, batch):
    assert set(make_model().training_outputs(batch)[1]) == set()
    assert set(make_model(**ALL_PARTS).training_outputs(batch)[1]) == {"alignment", "granularity"}
    assert set(make_model(make_sids(1), **ALL_PARTS).training_outputs(batch)[1]) == {"alignment"}
    without = make_model(**{**ALL_PARTS, "granularity_weight": 0})
    assert set(without.training_outputs(batch)[1]) == {"alignment"}
    assert not [name for name, _ in without.named_parameters() if "mask" in name]
    assert not [
        name for name, _ in make_model().named_parameters() if name.startswith(("hash_att", "semantic_att"))
    ]


def test_batch_without_targets_is_not_aligned(make_model, batch):
    batch = batch._replace(targets=torch.full_like(batch.targets, NUM_ITEMS))
    assert set(make_model(**ALL_PARTS).training_outputs(batch)[1]) == {"granularity"}


def test_shared_backbone_has_one_set_of_parameters(make_model):
    shared, own = make_model(share_backbone=True), make_model()
    assert shared.hash_backbone is shared.semantic_backbone
    backbone = sum(parameter.numel() for parameter in own.hash_backbone.parameters())
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in shared.parameters()) + backbone


@pytest.mark.parametrize("settings", [{}, ALL_PARTS], ids=["default", "all parts"])
def test_ragged_codebooks_and_sparse_gradients(settings, make_model, batch):
    model = make_model(make_sids(sizes=(2, 7, 3)), sparse=True, **settings)
    users, losses = model.training_outputs(batch, Pairs())
    (users.sum() + sum(losses.values())).backward()
    assert model.embedding.hash_table.grad.is_sparse
    assert all(codebook.grad is not None for codebook in model.embedding.codebooks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment_weight": -0.1}, "alignment_weight must be 0 or more, got -0.1"),
        ({"granularity_weight": float("nan")}, "granularity_weight must be 0 or more, got nan"),
        ({"min_shared_codes": 5}, r"min_shared_codes must lie in 1 \.\. 4, got 5"),
        ({"max_aligned_items": 0}, "max_aligned_items must be at least 1, got 0"),
        ({"mixing": "gate"}, "mixing must be one of 'sum', 'attention', 'residual_attention', got 'gate'"),
        (
            {"granularity_weight": 0.1},
            "granularity_weight must be 0 with mixing='sum', which has no gate, got 0.1",
        ),
        (
            {"alignment_weight": 0.1, "alignment_temperature": 0.0},
            "temperature must be a finite number above 0",
        ),
        ({"fusion": "max"}, "mode must be one of 'sum', 'mean', 'adaptive', got 'max'"),
        ({"num_heads": 3}, "num_heads must divide dim"),
    ],
)
def test_refuses_bad_settings(settings, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model(**settings)

"""What holds for every model alike."""

import copy
import functools

import pytest
import torch

from h2rec import SemanticIds
from h2rec.data import SequenceBatch
from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding
from h2rec.models import MODELS, H2Rec, SingleBranch, build_model, model_settings
from h2rec.models.backbones import BACKBONES
from h2rec.optim import RowwiseAdagrad
from h2rec.training.losses import full_softmax

NUM_ITEMS = 40
SMALL = {"dim": 8, "max_length": 10}


# Of H2Rec; the default leaves them out.
ALL_PARTS = {"mixing": "residual_attention", "alignment_weight": 0.1, "granularity_weight": 0.1}


@pytest.fixture
def sids():
    generator = torch.Generator().manual_seed(0)
    return SemanticIds(torch.randint(6, (NUM_ITEMS, 4), generator=generator), codebook_sizes=(6, 6, 6, 6))


@pytest.fixture(params=[*MODELS, "h2rec with all parts"])
def build(request, sids, device):
    """Builds one of the models."""
    settings = {**SMALL, **(ALL_PARTS if request.param.endswith("parts") else {})}
    return functools.partial(build_model, request.param.partition(" ")[0], sids, **settings)


@pytest.fixture
def model(build, device):
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():  # the small start would hide differences below the tests' tolerance
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(device)


@pytest.fixture
def make_batch(device):
    def make(lengths=(7, 1, 4)):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor(lengths)
        items = torch.randint(NUM_ITEMS, (len(lengths), int(lengths.max())), generator=generator)
        targets = torch.randint(NUM_ITEMS, items.shape, generator=generator)
        padded = torch.arange(items.shape[1]) >= lengths[:, None]
        return SequenceBatch(
            user_ids=torch.arange(len(lengths)).to(device),
            item_ids=items.masked_fill(padded, NUM_ITEMS).to(device),
            lengths=lengths.to(device),
            targets=targets.masked_fill(padded, NUM_ITEMS).to(device),
        )

    return make


def test_shapes(model, make_batch):
    batch = make_batch()
    users = model.encode(batch.item_ids, batch.lengths)
    items = model.item_vectors()
    is_wide = isinstance(model, H2Rec) or getattr(model.embedding, "fusion", None) == "concat"
    width = 16 if is_wide else 8
    assert users.shape == (3, 7, width)
    assert items.shape == (NUM_ITEMS, width)
    assert model.item_vectors(batch.item_ids).shape == (3, 7, width)
    assert model.padding_idx == model.num_items == NUM_ITEMS


def test_item_vectors_of_all_and_of_some(model, device):
    items = model.item_vectors()
    assert torch.equal(items, model.item_vectors(torch.arange(NUM_ITEMS, device=device)))
    ids = torch.tensor([[3, 39], [0, 3]], device=device)
    torch.testing.assert_close(model.item_vectors(ids), items[ids])
    assert (model.item_vectors(torch.tensor([NUM_ITEMS], device=device)) == 0).all()


def test_later_items_change_nothing(model, make_batch):
    model.eval()
    batch = make_batch(lengths=(7, 7, 7))
    users = model.encode(batch.item_ids, batch.lengths)
    for t in range(6):
        changed = batch.item_ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % NUM_ITEMS
        others = model.encode(changed, batch.lengths)
        assert torch.equal(others[:, : t + 1], users[:, : t + 1])
        assert not torch.allclose(others[:, t + 1 :], users[:, t + 1 :])


def test_later_positions_get_no_gradient(model, device):
    """Causality by autograd: no path from what is looked up at a later position, whatever the values are."""
    model.eval()
    looked_up = []
    model.embedding.register_forward_hook(lambda layer, inputs, output: looked_up.append(output))
    users = model.encode(torch.arange(6, device=device)[None], torch.tensor([6], device=device))
    vectors = looked_up[0] if isinstance(looked_up[0], tuple) else looked_up
    for t in range(6):
        for gradient in torch.autograd.grad(users[0, t].square().sum(), vectors, retain_graph=True):
            assert gradient[0, t].abs().sum() > 0
            assert (gradient[0, t + 1 :] == 0).all()


@pytest.mark.parametrize("backbone", ["gru4rec", "bert4rec"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("sum", {}), ("h2rec", {}), ("h2rec", ALL_PARTS)],
    ids=["sum", "h2rec", "all parts"],
)
def test_other_backbones_are_causal_too(name, settings, backbone, sids, device, make_batch):
    torch.manual_seed(0)
    model = build_model(name, sids, backbone=backbone, **settings, **SMALL).to(device).eval()
    backbones = {"sum": ["backbone"], "h2rec": ["hash_backbone", "semantic_backbone"]}[name]
    assert {type(getattr(model, attribute)) for attribute in backbones} == {BACKBONES[backbone]}
    test_later_items_change_nothing(model, make_batch)


def test_padding_changes_nothing(model, device, make_batch):
    model.eval()
    short = make_batch(lengths=(5, 2, 4))
    wide = short.item_ids.new_full((3, 9), NUM_ITEMS)
    wide[:, :5] = short.item_ids
    users = model.encode(short.item_ids, short.lengths)
    padded_users = model.encode(wide, short.lengths)
    real = torch.arange(5, device=device) < short.lengths[:, None]
    torch.testing.assert_close(padded_users[:, :5][real], users[real])
    junk = short.item_ids.masked_fill(~real, 7)
    torch.testing.assert_close(model.encode(junk, short.lengths)[real], users[real])


def test_a_user_does_not_depend_on_its_batch(model, make_batch):
    model.eval()
    batch = make_batch(lengths=(7, 3, 5))
    users = model.encode(batch.item_ids, batch.lengths)
    alone = model.encode(batch.item_ids[1:2, :3], batch.lengths[1:2])
    torch.testing.assert_close(alone[0], users[1, :3])


def test_training_outputs_are_encode_and_finite_losses(model, make_batch):
    model.eval()
    batch = make_batch()
    users, losses = model.training_outputs(batch)
    torch.testing.assert_close(users, model.encode(batch.item_ids, batch.lengths))
    has_all_parts = getattr(model, "mixing", "sum") == "residual_attention"
    assert set(losses) == ({"alignment", "granularity"} if has_all_parts else set())
    for loss in losses.values():
        assert loss.shape == ()
        assert torch.isfinite(loss)


def test_every_parameter_gets_a_gradient(model, make_batch):
    batch = make_batch()
    users, losses = model.training_outputs(batch)
    (users.square().sum() + sum(losses.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if not name.endswith("key_value.bias"):  # half of it, a key's bias, cancels in the softmax
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("name", ["hash", "sum", "h2rec"])
def test_tables_train_inside_the_backward_pass(name, sids, make_batch, device):
    torch.manual_seed(0)
    model = build_model(name, sids, sparse=True, dropout=0.0, **SMALL).to(device)
    table = model.embedding.hash_table
    start = table.detach().clone()
    RowwiseAdagrad([table], lr=0.02)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not table], lr=1e-2)
    batch = make_batch()
    is_position = batch.targets != NUM_ITEMS
    losses = []
    for _ in range(30):
        users, auxiliary = model.training_outputs(batch)
        next_item = full_softmax(users[is_position], model.item_vectors(), batch.targets[is_position])
        losses.append(next_item.item())
        optimizer.zero_grad()
        (next_item + sum(auxiliary.values())).backward()
        assert table.grad is None
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(table, start)


def test_first_logits_are_small(sids, device, make_batch):
    batch = make_batch(lengths=(9, 9, 9))
    for name in MODELS:
        torch.manual_seed(0)
        model = build_model(name, sids, dim=64).to(device)
        users, items = model.encode(batch.item_ids, batch.lengths), model.item_vectors()
        logits = users @ items.T
        assert logits.std() < 0.5 * (items.shape[1] / 64) ** 0.5, name
        assert logits.std() > 0.01, name


def test_state_dict_and_deepcopy(build, model, device, make_batch):
    model.eval()
    other = build().to(device).eval()
    other.load_state_dict(model.state_dict())
    batch = make_batch()
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(
            twin.encode(batch.item_ids, batch.lengths), model.encode(batch.item_ids, batch.lengths)
        )
        assert torch.equal(twin.item_vectors(), model.item_vectors())


def test_encode_compiles(model, make_batch):
    model.eval()
    batch = make_batch()
    encode = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    users = encode(batch.item_ids, batch.lengths)
    torch.testing.assert_close(users, model.encode(batch.item_ids, batch.lengths))
    users.sum().backward()
    item_vectors = torch.compile(model.item_vectors, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(item_vectors(), model.item_vectors())


def test_autocast(model, device, make_batch):
    batch = make_batch()
    with torch.autocast(device, dtype=torch.bfloat16):
        users, losses = model.training_outputs(batch)
        loss = users.float().square().mean() + sum(losses.values())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_refuses_bad_sequences(model, device, monkeypatch, make_batch):
    batch = make_batch()
    too_long = torch.zeros(2, 11, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"item_ids must have shape \[B, T\], got \[7\]"):
        model.encode(batch.item_ids[0], batch.lengths)
    with pytest.raises(ValueError, match="item_ids must hold at most max_length=10 positions, got 11"):
        model.encode(too_long, torch.tensor([11, 11], device=device))
    with pytest.raises(ValueError, match=r"lengths must have shape \[3\], got \[2\]"):
        model.encode(batch.item_ids, batch.lengths[:2])
    monkeypatch.setenv("H2REC_CHECK_VALUES", "1")  # on a GPU only when asked for
    with pytest.raises(ValueError, match=str(NUM_ITEMS + 1)):
        model.encode(torch.full_like(batch.item_ids, NUM_ITEMS + 1), batch.lengths)


def test_registry_builds_what_it_says(sids):
    kinds = dict.fromkeys(MODELS.keys() - {"h2rec"}, HarmonizedEmbedding)
    kinds |= {"hash": HashEmbedding, "llminit": HashEmbedding, "semantic": SemanticEmbedding}
    for name, kind in kinds.items():
        model = build_model(name, sids)
        assert isinstance(model, SingleBranch)
        assert type(model.embedding) is kind
        if kind is HarmonizedEmbedding:
            assert model.embedding.fusion == name
    assert isinstance(build_model("h2rec", sids), H2Rec)


def test_content_starts_every_hash_table_alike(sids):
    content = torch.randn(NUM_ITEMS, 30, generator=torch.Generator().manual_seed(0))
    tables = []
    for name in ("llminit", "sum", "mean", "concat", "h2rec"):
        table = build_model(name, sids, content=content, **SMALL).embedding.hash_table
        assert table.square().mean().sqrt().item() == pytest.approx(0.02)
        tables.append(table)
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0])
    # Principal components: the products of the rows are those of the centred content, as far as 8 of 30 go.
    centred = content - content.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = u[:, :8] * s[:8]
    products, expected_products = tables[0] @ tables[0].T, expected @ expected.T
    torch.testing.assert_close(
        products / products.norm(), expected_products / expected_products.norm(), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("name", ["hash", "semantic"])
def test_takes_no_content(name, sids):
    content = torch.randn(NUM_ITEMS, 30)
    torch.manual_seed(0)
    plain = build_model(name, sids, **SMALL).state_dict()
    torch.manual_seed(0)
    with_content = build_model(name, sids, content=content, **SMALL).state_dict()
    assert with_content.keys() == plain.keys()
    assert all(torch.equal(with_content[key], plain[key]) for key in plain)


def test_model_settings():
    assert model_settings("hash") == {
        "dim": 64,
        "sparse": False,
        "backbone": "sasrec",
        "num_layers": 2,
        "num_heads": 2,
        "max_length": 50,
        "dropout": 0.2,
    }
    assert model_settings("semantic").keys() == model_settings("hash").keys() - {"sparse"}
    assert model_settings("sum") == model_settings("hash")
    assert model_settings("h2rec").keys() > model_settings("hash").keys()


def test_settings_arrive(sids):
    model = build_model("sum", sids, dim=16, num_layers=3, num_heads=4, max_length=20, dropout=0.4)
    assert model.embedding.embedding_dim == 16
    assert len(model.backbone.blocks) == 3
    assert model.backbone.blocks[0].attention.num_heads == 4
    assert model.max_length == 20
    assert model.backbone.blocks[0].dropout.p == model.input.dropout.p == 0.4


def test_refuses_unknown_names_and_settings(sids):
    with pytest.raises(
        ValueError,
        match="one of 'hash', 'llminit', 'semantic', 'sum', 'mean', 'concat', 'h2rec', got 'tiger'",
    ):
        build_model("tiger", sids)
    with pytest.raises(TypeError, match="model 'hash' has no setting alignment_weight; it has dim, sparse"):
        build_model("hash", sids, alignment_weight=0.1)

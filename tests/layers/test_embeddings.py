"""What the three embedding layers have in common, and what each adds."""

from itertools import accumulate

import pytest
import torch

from h2rec import SemanticIds
from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding, _tables

NUM_ITEMS, DIM = 50, 8


def make_sids(sizes=(6, 6, 6), dim=None):
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # where a catalog's semantic IDs are
        codes = torch.stack([torch.randint(0, k, (NUM_ITEMS,), generator=generator) for k in sizes], 1)
        books = None if dim is None else [torch.randn(k, dim, generator=generator) for k in sizes]
        return SemanticIds(codes, codebook_sizes=sizes, codebooks=books)


LAYERS = {
    "hash": lambda **k: HashEmbedding(NUM_ITEMS, DIM, **k),
    "hash multi": lambda **k: HashEmbedding(NUM_ITEMS, DIM, mode="multi", num_buckets=20, num_hashes=3, **k),
    "hash qr": lambda **k: HashEmbedding(NUM_ITEMS, DIM, mode="qr", **k),
    "semantic sum": lambda **k: SemanticEmbedding(make_sids(), DIM, **k),
    "semantic ragged": lambda **k: SemanticEmbedding(make_sids((3, 9, 5)), DIM, pooling="mean", **k),
    "semantic levels": lambda **k: SemanticEmbedding(make_sids(), DIM, pooling="levels", **k),
    "semantic concat": lambda **k: SemanticEmbedding(make_sids(), DIM, pooling="concat", **k),
    "semantic prefix": lambda **k: SemanticEmbedding(make_sids(), DIM, pooling="prefix", num_buckets=30, **k),
    "both sum": lambda **k: HarmonizedEmbedding(make_sids(), DIM, **k),
    "both concat": lambda **k: HarmonizedEmbedding(make_sids((3, 9, 5)), DIM, fusion="concat", **k),
    "both gate": lambda **k: HarmonizedEmbedding(make_sids(), DIM, fusion="gate", mode="qr", **k),
    "both mean": lambda **k: HarmonizedEmbedding(
        make_sids(), DIM, fusion="mean", mode="multi", num_buckets=9, **k
    ),
    "both none": lambda **k: HarmonizedEmbedding(make_sids(), DIM, fusion="none", pooling="levels", **k),
}
SHAPES = {"semantic levels": (3, DIM), "semantic concat": (3 * DIM,), "both concat": (2 * DIM,)}


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


@pytest.fixture
def item_ids(device):
    return torch.randint(0, NUM_ITEMS, (4, 5), generator=torch.Generator().manual_seed(1)).to(device)


def outputs(layer, item_ids):
    result = layer(item_ids)
    return result if isinstance(result, tuple) else (result,)


def test_shapes_and_attributes(name, item_ids, device):
    layer = LAYERS[name]().to(device)
    assert (layer.num_embeddings, layer.embedding_dim) == (NUM_ITEMS, DIM)
    result = outputs(layer, item_ids)
    if name == "both none":
        assert [r.shape for r in result] == [(4, 5, 3, DIM), (4, 5, DIM)]
    else:
        assert result[0].shape == (4, 5, *SHAPES.get(name, (DIM,)))


def rows_of(layer, item: int) -> list[int]:
    """Rows of the hash table that stand for an item, in Python's integers."""
    mode = getattr(layer, "mode", "prefix")
    if mode == "direct":
        return [item]
    if mode == "qr":
        divisor = layer.hashing.divisor
        return [item % divisor, divisor + item // divisor]
    size, constants = len(layer.hash_table), layer.hash_constants.tolist()
    keys = [item] * len(constants)
    if mode == "prefix":
        codes = layer.codes[item].tolist()
        _, *keys = accumulate(codes, lambda key, code: key * 0x9E3779B97F4A7C15 + code + 1, initial=0)
    return [
        ((((a * key + b) % 2**64) >> 32) * size) >> 32 for key, (a, b) in zip(keys, constants, strict=True)
    ]


def test_values(name, item_ids, device):
    """What each pooling and fusion is, in plain indexing."""
    layer = LAYERS[name]().to(device)
    ids = item_ids.flatten()
    semantic = hashed = None
    if hasattr(layer, "codebooks"):
        levels = [book[layer.codes[ids, level].long()] for level, book in enumerate(layer.codebooks)]
        semantic = {
            "sum": lambda: sum(levels),
            "mean": lambda: sum(levels) / len(levels),
            "levels": lambda: torch.stack(levels, 1),
            "concat": lambda: torch.cat(levels, 1),
        }[layer.pooling]()
    if hasattr(layer, "hash_table"):
        hashed = torch.stack([layer.hash_table[rows_of(layer, item)].sum(0) for item in ids.tolist()])
    expected = tuple(half for half in (semantic, hashed) if half is not None)
    if len(expected) == 2 and layer.fusion != "none":
        both = torch.cat([semantic, hashed], 1)
        expected = {
            "sum": lambda: (semantic + hashed,),
            "mean": lambda: ((semantic + hashed) / 2,),
            "concat": lambda: (both,),
            "gate": lambda: (semantic + layer.gate(both).sigmoid() * (hashed - semantic),),
        }[layer.fusion]()
    for result, value in zip(outputs(layer, item_ids), expected, strict=True):
        torch.testing.assert_close(result.flatten(0, 1), value)


def test_padding_gives_zeros_and_no_gradient(name, item_ids, device):
    for padding_idx, marker in ((7, 7), (-1, NUM_ITEMS - 1), (NUM_ITEMS, NUM_ITEMS)):
        layer = LAYERS[name](padding_idx=padding_idx).to(device)
        assert layer.padding_idx == marker
        result = outputs(layer, torch.full((3,), marker, device=device))
        if name != "both gate":
            assert all(torch.equal(r, torch.zeros_like(r)) for r in result)
        torch.autograd.backward([r.sum() for r in result])
        tables = {k: p for k, p in layer.named_parameters() if not k.startswith("gate")}
        assert all(p.grad is None or not p.grad.any() for p in tables.values())


def test_hash_constants_are_in_the_state_dict():
    for name in ("hash multi", "semantic prefix", "both mean"):
        assert LAYERS[name]().state_dict()["hash_constants"].dtype == torch.int64


def test_weight_is_what_the_layer_gives(name, item_ids, device):
    layer = LAYERS[name](padding_idx=7).to(device)
    if name == "both none":
        assert not hasattr(layer, "weight")
        return
    rows = layer.weight
    expected = layer(item_ids)
    assert rows.shape == (NUM_ITEMS, *expected.shape[2:])
    torch.testing.assert_close(rows[item_ids], expected)
    rows.sum().backward()  # as an output head that shares the vectors does
    assert all(p.grad is not None for p in layer.parameters())


def test_from_pretrained(item_ids, device):
    vectors = torch.randn(NUM_ITEMS, DIM, device=device)
    plain = torch.nn.Embedding.from_pretrained(vectors)
    layer = HashEmbedding.from_pretrained(vectors)
    assert (layer.num_embeddings, layer.embedding_dim) == (NUM_ITEMS, DIM)
    assert torch.equal(layer(item_ids), plain(item_ids))
    assert layer.weight.requires_grad is plain.weight.requires_grad is False
    assert layer.weight.data_ptr() == vectors.data_ptr() == plain.weight.data_ptr()
    layer = HashEmbedding.from_pretrained(vectors, freeze=False, padding_idx=-1, sparse=True)
    assert layer.padding_idx == NUM_ITEMS - 1
    layer(item_ids).sum().backward()
    assert layer.weight.grad.is_sparse
    with pytest.raises(ValueError, match=r"embeddings must have shape \[num_embeddings, D\], got \[8\]"):
        HashEmbedding.from_pretrained(vectors[0])


def test_is_made_on_the_default_device(name):
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    made = LAYERS[name]()
    layer.load_state_dict(made.state_dict(), assign=True)
    ids = torch.arange(NUM_ITEMS)
    for a, b in zip(outputs(layer, ids), outputs(made, ids), strict=True):
        torch.testing.assert_close(a, b)  # a gate's product may round otherwise on a busy machine


def test_direct_mode_is_nn_embedding(item_ids, device):
    layer = HashEmbedding(NUM_ITEMS, DIM).to(device)
    plain = torch.nn.Embedding(NUM_ITEMS, DIM, _weight=layer.weight.detach().clone())
    assert torch.equal(layer(item_ids), plain(item_ids))
    layer(item_ids).square().sum().backward()
    plain(item_ids).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_starts_from_the_codebooks_of_the_right_dimension():
    sids = make_sids(dim=DIM)
    layer = SemanticEmbedding(sids, DIM)
    assert torch.equal(layer.codebooks.detach(), torch.stack(sids.codebooks))
    with torch.no_grad():
        layer.codebooks.zero_()
    assert all(book.any() for book in sids.codebooks)  # a copy
    assert SemanticEmbedding(sids, 4).codebooks.shape == (3, 6, 4)


def test_sparse_gradients(item_ids, device):
    for name in ("hash", "hash multi", "hash qr", "semantic prefix", "both sum"):
        layer = LAYERS[name](sparse=True).to(device)
        dense = LAYERS[name]().to(device)
        dense.load_state_dict(layer.state_dict())
        for twin in (layer, dense):
            twin(item_ids).square().sum().backward()
        assert layer.hash_table.grad.is_sparse
        torch.testing.assert_close(layer.hash_table.grad.to_dense(), dense.hash_table.grad)


@pytest.mark.parametrize("part", [7, 1 << 18], ids=lambda part: f"{part} rows at a time")
def test_hash_table_starts_from_content(part, device, monkeypatch):
    monkeypatch.setattr(_tables, "_PART_ROWS", part)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(NUM_ITEMS, 20, generator=generator) * torch.linspace(3, 0.1, 20)
    for layer in (LAYERS["hash"]().to(device), LAYERS["both sum"]().to(device)):
        scale = layer.hash_table.std().item()
        layer.initialize_hash_table(vectors.to(device))
        assert layer.hash_table.std().item() == pytest.approx(scale, rel=0.05)
        table, centred = layer.hash_table.detach().cpu().double(), (vectors - vectors.mean(0)).double()
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        expected = centred @ directions[:DIM].T
        cosine = torch.nn.functional.cosine_similarity(table, expected, dim=0).abs()
        assert cosine.min() > 0.999
    with pytest.raises(ValueError, match="mode must be 'direct' for a start from content, got 'qr'"):
        LAYERS["hash qr"]().initialize_hash_table(vectors)
    with pytest.raises(ValueError, match=r"vectors must have shape \[50, D0\], got \[3, 4\]"):
        LAYERS["hash"]().initialize_hash_table(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashEmbedding(0, 4), "num_embeddings must be at least 1, got 0"),
        (lambda: HashEmbedding(4, 0), "embedding_dim must be at least 1, got 0"),
        (
            lambda: HashEmbedding(9, 4, mode="direct", num_buckets=5),
            "num_buckets must be None or num_embeddings",
        ),
        (
            lambda: HashEmbedding(9, 4, mode="multi"),
            "num_buckets must be at least 1 with mode='multi', got None",
        ),
        (
            lambda: HashEmbedding(9, 4, mode="qr", num_buckets=5),
            r"m \+ ceil\(9 / m\) for some m with mode='qr', got 5",
        ),
        (lambda: HashEmbedding(9, 4, mode="md5"), "mode must be one of 'direct', 'multi', 'qr', got 'md5'"),
        (lambda: HashEmbedding(9, 4, padding_idx=10), r"padding_idx must lie in \[-9, 9\], got 10"),
        (lambda: SemanticEmbedding(make_sids(), 4, pooling="max"), "pooling must be one of .* got 'max'"),
        (
            lambda: SemanticEmbedding(make_sids(), 4, pooling="prefix"),
            "num_buckets must be given with pooling",
        ),
        (
            lambda: SemanticEmbedding(make_sids(), 4, num_buckets=3),
            "num_buckets must be given with .* only then",
        ),
        (
            lambda: SemanticEmbedding(make_sids(), 4, sparse=True),
            "sparse must be False except with pooling='prefix', got True and 'sum'",
        ),
        (
            lambda: HarmonizedEmbedding(make_sids(), 4, fusion="max"),
            "fusion must be one of 'sum'.* got 'max'",
        ),
        (
            lambda: HarmonizedEmbedding(make_sids(), 4, pooling="levels"),
            "fusion must be 'none' with pooling='levels'",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ids_out_of_range(name, monkeypatch, device):
    if name == "hash multi":  # any id hashes somewhere
        return
    monkeypatch.setenv("H2REC_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=rf"item_ids must lie in \[0, {NUM_ITEMS}\)"):
        LAYERS[name]().to(device)(torch.tensor([NUM_ITEMS], device=device))


@pytest.mark.parametrize("layer", [SemanticEmbedding, HarmonizedEmbedding])
@pytest.mark.parametrize(("sids", "kind"), [("sids.safetensors", "str"), (make_sids().codes, "Tensor")])
def test_wants_semantic_ids(layer, sids, kind):
    with pytest.raises(TypeError, match=f"sids must be SemanticIds .*, got {kind}"):
        layer(sids, DIM)

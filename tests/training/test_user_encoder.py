import pytest
import torch

from h2rec import SemanticIds
from h2rec.models import build_model
from h2rec.training.user_encoder import compile_user_encoder, export_user_encoder

NUM_ITEMS, MAX_LENGTH = 30, 10


@pytest.fixture
def build(generator):
    def build(name: str, sizes: tuple[int, ...] = (4, 4), max_length: int = MAX_LENGTH, **settings):
        codes = torch.stack([torch.randint(size, (NUM_ITEMS,), generator=generator) for size in sizes], 1)
        sids = SemanticIds(codes, codebook_sizes=sizes)
        return build_model(name, sids, dim=8, num_layers=1, max_length=max_length, **settings).eval()

    return build


def sequences(batch: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    item_ids = torch.randint(NUM_ITEMS, (batch, length), generator=generator)
    return item_ids.masked_fill(torch.arange(length) >= lengths[:, None], NUM_ITEMS), lengths


@torch.no_grad()
def last_vectors(model, item_ids, lengths):
    return model.encode(item_ids, lengths)[torch.arange(len(lengths)), lengths - 1]


@pytest.mark.parametrize(
    ("name", "sizes", "settings"),
    [
        ("h2rec", (4, 4), {}),
        ("h2rec", (5, 3, 4), {"backbone": "gru4rec", "fusion": "adaptive"}),
        ("hash", (4,), {"backbone": "gru4rec"}),
        ("semantic", (4, 4), {"backbone": "bert4rec"}),
    ],
)
def test_the_program_is_the_model(name, sizes, settings, build, generator, tmp_path):
    model = build(name, sizes, **settings)
    program = export_user_encoder(model, tmp_path / "u.pt2")
    assert not [node.target for node in program.graph.nodes if "h2rec" in str(node.target)]
    encode = torch.export.load(tmp_path / "u.pt2").module()
    for batch, length in ((1, 1), (1, 7), (5, 1), (7, MAX_LENGTH)):
        item_ids, lengths = sequences(batch, length, generator)
        expected = last_vectors(model, item_ids, lengths)
        torch.testing.assert_close(encode(item_ids, lengths), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match=f"<= {MAX_LENGTH}"):
        encode(*sequences(2, MAX_LENGTH + 1, generator))


def test_a_model_of_one_position(build, generator, tmp_path):
    model = build("sum", max_length=1)
    export_user_encoder(model, tmp_path / "u.pt2")
    item_ids, lengths = sequences(4, 1, generator)
    users = torch.export.load(tmp_path / "u.pt2").module()(item_ids, lengths)
    torch.testing.assert_close(users, last_vectors(model, item_ids, lengths))


def test_what_is_out_of_range_is_nan_and_disturbs_no_other_row(build, tmp_path):
    model = build("h2rec")
    item_ids = torch.tensor([[3, 4], [-1, 2], [NUM_ITEMS + 1, 3], [2, 5], [2, 5], [2, NUM_ITEMS]])
    lengths = torch.tensor([2, 1, 1, 0, 3, 1])
    export_user_encoder(model, tmp_path / "u.pt2")
    users = torch.export.load(tmp_path / "u.pt2").module()(item_ids, lengths)
    assert users.isnan().all(1).tolist() == users.isnan().any(1).tolist() == [False, *[True] * 4, False]
    torch.testing.assert_close(users[[0, 5]], last_vectors(model, item_ids[[0, 5]], lengths[[0, 5]]))


@pytest.mark.slow
def test_compiled_ahead_of_time(build, generator, tmp_path):
    model = build("semantic", num_heads=1)
    compile_user_encoder(export_user_encoder(model, tmp_path / "u.pt2"), tmp_path / "aot.pt2")
    encode = torch._inductor.aoti_load_package(str(tmp_path / "aot.pt2"))
    for batch, length in ((1, 1), (7, MAX_LENGTH)):
        item_ids, lengths = sequences(batch, length, generator)
        expected = last_vectors(model, item_ids, lengths)
        torch.testing.assert_close(encode(item_ids, lengths), expected, rtol=1e-5, atol=1e-5)

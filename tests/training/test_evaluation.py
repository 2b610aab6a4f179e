import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from h2rec import SemanticIds
from h2rec.data import InteractionLog, ItemCatalog, Split, leave_one_out, sample_negatives
from h2rec.models import MODELS, SequentialModel, build_model
from h2rec.training import evaluate_model, evaluation, rank_users
from h2rec.training.evaluation import eval_batches, metrics_by_group, ranks_of_targets, repeated_share

NUM_ITEMS, NUM_USERS = 50, 40


class SmallIntegers(SequentialModel):
    """Sums of small integers: scores are exact in fp32, whatever the order of the sums, and many of them tie."""

    def __init__(self, num_items: int = NUM_ITEMS, max_length: int = 6) -> None:
        super().__init__(num_items, max_length)
        rows = torch.randint(-2, 3, (num_items, 4), generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(torch.cat([rows, torch.zeros(1, 4, dtype=torch.int64)]).float())

    def encode(self, item_ids, lengths):
        self._check_sequences(item_ids, lengths)
        return self.table[item_ids].cumsum(1)

    def item_vectors(self, item_ids=None):
        return self.table[: self.num_items] if item_ids is None else self.table[item_ids]


@pytest.fixture(scope="module")
def split() -> Split:
    """Users with 1 to 12 items, repeats among them; one whose held-out items it had before."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, NUM_ITEMS, rng.integers(1, 13)).tolist() for _ in range(NUM_USERS - 1)]
    sequences.append([7, 3, 7, 3])
    offsets = np.cumsum([0, *map(len, sequences)])
    log = InteractionLog(
        pl.Series(range(NUM_USERS)),
        ItemCatalog(pl.Series(range(NUM_ITEMS))),
        offsets,
        np.concatenate(sequences),
    )
    return leave_one_out(log)


@pytest.fixture
def model(device) -> SmallIntegers:
    return SmallIntegers().to(device)


def ranks_by_hand(model, split, stage, negatives, mask_history):
    """One user and one candidate at a time."""
    table = model.table.tolist()
    users, full, sampled = [], [], []
    for user in range(split.num_users):
        sequence = split.log.items[split.log.offsets[user] : split.log.offsets[user + 1]].tolist()
        if len(sequence) < 3:
            continue
        *history, target = sequence if stage == "test" else sequence[:-1]
        vector = [sum(column) for column in zip(*(table[item] for item in history[-6:]), strict=True)]

        def rank(candidates, vector=vector, target=target):
            scores = {
                item: sum(a * b for a, b in zip(vector, table[item], strict=True)) for item in candidates
            }
            above = sum(score > scores[target] for score in scores.values())
            ties = sum(score == scores[target] for score in scores.values()) - 1
            return 1 + above + ties / 2

        hidden = set(history) - {target} if mask_history else set()
        users.append(user)
        full.append(rank(set(range(NUM_ITEMS)) - hidden))
        sampled.append(rank({target, *negatives[user].tolist()}))
    return users, full, sampled


@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize("mask_history", [False, True], ids=["history kept", "history masked"])
@pytest.mark.parametrize("tile", [1, 3, 1000], ids=lambda tile: f"tiles of {tile}")
def test_ranks(stage, mask_history, tile, split, model, device, monkeypatch):
    monkeypatch.setattr(evaluation, "_TILE_ELEMENTS", {device: tile * NUM_ITEMS})
    monkeypatch.setattr(evaluation, "_BATCH_SIZE", 16)
    negatives = sample_negatives(split, stage, 20, seed=3)
    ranks = rank_users(model, split, stage, negatives=negatives, mask_history=mask_history)
    users, full, sampled = ranks_by_hand(model.cpu(), split, stage, negatives, mask_history)
    assert ranks.users.tolist() == users
    assert ranks.targets.tolist() == split.targets(stage)[users].tolist()
    assert ranks.full.tolist() == full
    assert ranks.sampled.tolist() == sampled
    assert any(rank % 1 for rank in full), "no ties: the test says nothing about them"


def test_no_sampled_ranks_without_negatives(split, model):
    assert rank_users(model, split, "test").sampled is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ranks_of_targets_in_a_large_catalog(dtype, device):
    """Counts beyond what the dtype of the scores can hold."""
    scores = torch.full((2, 70_001), 1.0, dtype=dtype, device=device)
    scores[0, :33] = 3.0
    scores[1, 0], scores[1, 1:] = 2.0, -torch.inf
    ranks = ranks_of_targets(scores, torch.tensor([[1.0], [2.0]], dtype=dtype, device=device))
    assert ranks.tolist() == [33 + (70_001 - 33 + 1) / 2, 1.0]


def test_equal_items_tie_whatever_the_rounding(split, device):
    """Items with the same semantic ID: a matrix product may round equal columns differently."""
    sids = SemanticIds(torch.zeros(NUM_ITEMS, 3, dtype=torch.int64), codebook_sizes=(4, 4, 4))
    ranks = rank_users(build_model("semantic", sids, dim=16).to(device), split, "test", mask_history=False)
    assert (ranks.full == (NUM_ITEMS + 1) / 2).all()


@pytest.mark.parametrize("name", MODELS)
def test_batches_do_not_matter(name, split, device, monkeypatch):
    sids = SemanticIds(torch.randint(4, (NUM_ITEMS, 2), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    model = build_model(name, sids, dim=8, max_length=6, dropout=0.9).to(device).train()
    together = rank_users(model, split, "test")
    monkeypatch.setattr(evaluation, "_BATCH_SIZE", 1)
    alone = rank_users(model, split, "test")
    assert model.training, "the mode is not what it was"
    # One rank may be off by one where two scores are equal up to rounding.
    assert np.abs(together.full - alone.full).sum() <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", ["valid", "test"])
def test_every_user_once_over_all_processes(stage, world_size, split, model):
    users = [
        user
        for rank in range(world_size)
        for batch in eval_batches(split, stage, model, rank=rank, world_size=world_size)
        for user in batch.user_ids.tolist()
    ]
    assert sorted(users) == np.flatnonzero(split.targets(stage) >= 0).tolist()


@pytest.mark.parametrize("stage", ["valid", "test"])
def test_later_items_change_no_rank_input(stage, split, model):
    """A rank depends on what came before its target only."""
    items = split.log.items.copy()
    held_out = np.flatnonzero(split.test_targets >= 0)
    items[split.log.offsets[held_out + 1] - 1] = 11  # every test item
    log = InteractionLog(split.log.users, split.log.catalog, split.log.offsets, items)
    ranks, others = rank_users(model, split, stage), rank_users(model, leave_one_out(log), stage)
    assert (ranks.full == others.full).all() == (stage == "valid")


@pytest.mark.parametrize("stage", ["valid", "test"])
def test_share_of_users_whose_held_out_item_is_repeated(stage, split):
    repeated = []
    for user in np.flatnonzero(split.targets(stage) >= 0):
        sequence = split.log.items[split.log.offsets[user] : split.log.offsets[user + 1]].tolist()
        *history, target = sequence if stage == "test" else sequence[:-1]
        repeated.append(target in history)
    assert 0 < repeated_share(split, stage) == np.mean(repeated) < 1
    assert repeated_share(split, stage, np.array([NUM_USERS - 1])) == 1


def test_metrics_by_hand():
    # 10 items, so 2 in the head: 9 (100 times), and of the two with 30 the lower id.
    counts = np.array([0, 1, 9, 10, 29, 30, 30, 0, 0, 100])
    targets = np.array([9, 5, 6, 4, 2, 0, 9])
    ranks = np.array([1.0, 5.0, 5.5, 10.0, 20.0, 20.5, 2.5])
    metrics = metrics_by_group(ranks, targets, counts)

    overall = metrics["overall"]
    assert overall["count"] == 7
    assert overall["HR@5"] == pytest.approx(3 / 7)
    assert overall["HR@10"] == pytest.approx(5 / 7)
    assert overall["HR@20"] == pytest.approx(6 / 7)
    gains = [1 / np.log2(1 + rank) for rank in ranks]
    assert overall["NDCG@5"] == pytest.approx((gains[0] + gains[1] + gains[6]) / 7)
    assert overall["NDCG@10"] == pytest.approx((gains[0] + gains[1] + gains[2] + gains[3] + gains[6]) / 7)
    assert overall["NDCG@20"] == pytest.approx((sum(gains) - gains[5]) / 7)

    assert metrics["head"]["count"] == 3
    assert metrics["head"]["NDCG@10"] == pytest.approx((gains[0] + gains[1] + gains[6]) / 3)
    assert metrics["tail"]["count"] == 4
    assert metrics["tail"]["HR@10"] == pytest.approx(2 / 4)

    bands = {name: band["count"] for name, band in metrics["bands"].items()}
    assert bands == {"0": 1, "1-9": 1, "10-29": 1, "30-59": 2, "60-99": 0, "100+": 2}
    assert metrics["bands"]["30-59"]["HR@5"] == 0.5
    assert metrics["bands"]["0"]["NDCG@20"] == 0
    assert metrics["bands"]["60-99"] == dict.fromkeys(overall) | {"count": 0}


def test_evaluate_model_is_ranks_and_groups(split, model):
    negatives = sample_negatives(split, "test", 20, seed=5)
    ranks = rank_users(model, split, "test", negatives=negatives, mask_history=False)
    counts = np.bincount(split.train_items, minlength=NUM_ITEMS)
    assert evaluate_model(model, split, "test", num_negatives=20, mask_history=False, seed=5) == {
        "full": metrics_by_group(ranks.full, ranks.targets, counts),
        "sampled": metrics_by_group(ranks.sampled, ranks.targets, counts),
    }
    assert evaluate_model(model, split, "test", num_negatives=20, seed=6) != evaluate_model(
        model, split, "test", num_negatives=20, seed=5
    )


def test_refuses_what_is_not_finite(split, model):
    with torch.no_grad():
        model.table[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="item vectors are not finite"):
        rank_users(model, split, "test")
    with torch.no_grad():
        model.table[3, 0] = 0
    encode = model.encode
    model.encode = lambda *arguments: encode(*arguments) * torch.nan
    with pytest.raises(FloatingPointError, match="the model's test scores are not finite"):
        rank_users(model, split, "test")


def test_refuses_an_unknown_stage(split, model):
    with pytest.raises(ValueError, match="stage: expected 'valid' or 'test', got 'train'"):
        rank_users(model, split, "train")

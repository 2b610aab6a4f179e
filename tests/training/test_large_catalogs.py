"""What is done otherwise when a catalog is large; here every catalog is."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from h2rec import SemanticIds
from h2rec.data import sample_negatives
from h2rec.layers import _tables
from h2rec.models import SequentialModel, base, build_model
from h2rec.optim import RowwiseAdagrad
from h2rec.training import (
    TrainConfig,
    config,
    evaluate_model,
    load_model,
    rank_users,
    read_split,
    related_items,
    run,
    tiled_ranks,
    train_run,
)
from h2rec.training.module import Recommender
from h2rec.training.recommend import item_history, recommend

NUM_ITEMS, DIM = 4001, 16


@pytest.fixture(autouse=True)
def large(monkeypatch):
    monkeypatch.setattr(config, "LARGE_CATALOG", 1)
    monkeypatch.setattr(related_items, "FULL_SOFTMAX_MAX_ITEMS", 1)
    monkeypatch.setattr(base, "_PART_ITEMS", {"cpu": 200, "cuda": 200})
    monkeypatch.setattr(base, "_SUM_ELEMENTS", 1000)
    monkeypatch.setattr(_tables, "_PART_ROWS", 300)
    monkeypatch.setattr(tiled_ranks, "_TILE", {"cpu": (16, 64), "cuda": (16, 64)})


class Allocations(TorchDispatchMode):
    """Tensors of at least so many bytes that operators have made, by operator and shape; views do not count."""

    def __init__(self, least_bytes: int) -> None:
        super().__init__()
        self.least_bytes = least_bytes
        self.made: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _dense(args, kwargs)}
        self.made += [
            (func.name(), list(tensor.shape))
            for tensor in _dense(result)
            if tensor.nbytes >= self.least_bytes and tensor.untyped_storage().data_ptr() not in known
        ]
        return result


def _dense(*values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_sparse]


@pytest.fixture(scope="module")
def catalog_config(tmp_path_factory, device) -> TrainConfig:
    folder = tmp_path_factory.mktemp("catalog")
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(120), 9)
    items = rng.integers(0, NUM_ITEMS, len(users))
    pl.DataFrame({"user_id": users, "item_id": items}).write_parquet(folder / "log.parquet")
    codes = torch.from_numpy(rng.integers(0, 8, (NUM_ITEMS, 3)))
    SemanticIds(codes, codebook_sizes=(8, 8, 8)).save(folder / "sids.safetensors")
    np.save(folder / "vectors.npy", rng.standard_normal((NUM_ITEMS, 2 * DIM), dtype=np.float32))
    return TrainConfig(
        interactions=str(folder / "log.parquet"),
        sids=str(folder / "sids.safetensors"),
        embeddings=str(folder / "vectors.npy"),
        models=("sum", "h2rec"),
        dim=DIM,
        num_layers=1,
        max_length=8,
        batch_size=16,
        loss="sampled_softmax",
        num_negatives=16,
        max_epochs=2,
        steps_per_epoch=3,
        eval_users=40,
        ranking_negatives=5,
        accelerator="cpu" if device == "cpu" else "gpu",
    )


def test_nothing_as_large_as_the_table(catalog_config, tmp_path, device):
    """Training, ranking, checkpoints, loading and recommending allocate the table itself and nothing like it.

    Content is mapped, so that it does not count: no operator makes it.
    """
    table = ("aten::randn", [NUM_ITEMS, DIM])
    with Allocations(NUM_ITEMS * DIM * 4 // 2) as training:
        train_run(catalog_config, tmp_path / "run")
    on_gpu = [] if device == "cpu" else [("aten::_to_copy", [NUM_ITEMS, DIM])]
    assert training.made == [table, *on_gpu] * len(catalog_config.models)
    for name in catalog_config.models:
        with Allocations(NUM_ITEMS * DIM * 4 // 2) as serving:
            model, _, catalog, _ = load_model(tmp_path / "run", name)
            split = read_split(catalog_config, NUM_ITEMS)
            evaluate_model(model, split, "test", num_negatives=5, users=split.sample_users(40, 0))
            assert len(recommend(model, catalog, [item_history(catalog, [5, 7])])[0]) == 10
        assert serving.made == [table]


def test_what_a_dense_step_allocates_is_noticed(catalog_config, tmp_path, monkeypatch):
    """The test above can fail."""
    monkeypatch.undo()
    with Allocations(NUM_ITEMS * DIM * 4 // 2) as training:
        train_run(catalog_config, tmp_path / "run")
    assert {"aten::zeros_like", "aten::_unique2", "aten::unique_dim"} & {name for name, _ in training.made}


@pytest.mark.parametrize("name", ["hash", "semantic", "sum", "h2rec"])
def test_optimizers(name, catalog_config):
    """The table by row-wise Adagrad, everything else by AdamW."""
    sids = SemanticIds.load(catalog_config.sids)
    unsmoothed = dataclasses.replace(catalog_config, target_smoothing=0.0)
    split = read_split(unsmoothed, NUM_ITEMS)
    module = Recommender(name, run._build(name, unsmoothed, sids), unsmoothed, split)
    dense, *sparse = module.configure_optimizers()
    tables = [p for optimizer in sparse for group in optimizer.param_groups for p in group["params"]]
    assert [type(optimizer) for optimizer in sparse] == [RowwiseAdagrad] * (name != "semantic")
    assert [list(table.shape) for table in tables] == [[NUM_ITEMS, DIM]] * (name != "semantic")
    of_both = [*dense.param_groups[0]["params"], *tables]
    assert sorted(map(id, of_both)) == sorted(map(id, module.model.parameters()))
    model = run._build(name, dataclasses.replace(unsmoothed, table_optimizer="adamw"), sids)
    assert Recommender(name, model, unsmoothed, split).automatic_optimization


def test_learns(make_config, tmp_path):
    """As far above the 10 of 60 that chance gives as with AdamW, see `test_models_learn`."""
    changes = {"table_learning_rate": 0.05, "loss": "full_softmax"}
    metrics = train_run(make_config(models=("sum",), max_epochs=15, dim=32, **changes), tmp_path / "run")
    assert metrics["models"]["sum"]["test"]["full"]["overall"]["HR@10"] > 0.6


def test_goes_on_after_an_interruption(catalog_config, tmp_path, monkeypatch):
    undisturbed = train_run(catalog_config, tmp_path / "undisturbed")
    save, saved = run.WholeCheckpoints.save_checkpoint, []

    def stop(self, checkpoint, path, **options) -> None:
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(self, checkpoint, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run.WholeCheckpoints, "save_checkpoint", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_run(catalog_config, tmp_path / "stopped")
    resumed = train_run(catalog_config, tmp_path / "stopped", resume=True)
    for name in catalog_config.models:
        assert resumed["models"][name]["test"] == undisturbed["models"][name]["test"]
        states = [
            torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)
            for folder in (tmp_path / "stopped", tmp_path / "undisturbed")
        ]
        weights, others = (state["state_dict"] for state in states)
        torch.testing.assert_close(weights, others, rtol=0, atol=0)
        sums, others = (state["optimizer_states"][1]["state"][0]["sum"] for state in states)
        assert torch.equal(sums, others)
        assert sums.shape == (NUM_ITEMS,)


def test_epochs_of_so_many_steps(catalog_config, tmp_path):
    steps = []
    original = Recommender.training_step

    def training_step(self, batch, batch_idx):
        steps.append((self.current_epoch, batch.user_ids.tolist()))
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recommender, "training_step", training_step)
        train_run(TrainConfig(**{**vars(catalog_config), "models": ("hash",)}), tmp_path / "run")
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1]
    seen = [user for _, users in steps[:3] for user in users]
    assert len(set(seen)) == len(seen) <= 48
    assert steps[0][1] != steps[3][1]


def test_two_processes(catalog_config, device, tmp_path):
    if device != "cpu":
        pytest.skip("NCCL averages no sparse gradients")
    changes = {"devices": 2, "models": ("h2rec",), "table_optimizer": "rowwise_adagrad"}
    metrics = train_run(TrainConfig(**{**vars(catalog_config), **changes}), tmp_path / "run")
    model, _, _, _ = load_model(tmp_path / "run", "h2rec")
    split = read_split(catalog_config, NUM_ITEMS)
    users = split.sample_users(40, 0)
    assert metrics["ranking"]["users"] == len(users) == 40
    test = metrics["models"]["h2rec"]["test"]
    assert evaluate_model(model, split, "test", num_negatives=5, users=users)["full"] == test["full"]


def test_refuses_sparse_gradients_on_several_gpus(catalog_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = TrainConfig(**{**vars(catalog_config), "devices": 2, "accelerator": "gpu"})
    with pytest.raises(
        ValueError, match=r"table_optimizer: expected 'adamw' with .* got 'auto' for 4,001 items"
    ):
        train_run(several, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- ranks


class Rows(SequentialModel):
    """A user is the last item's row, which makes all scores known."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(len(rows), 8)
        self.rows = torch.nn.Parameter(rows)

    def encode(self, item_ids, lengths):
        return self.rows[item_ids.clamp(max=self.num_items - 1)]

    def item_vectors(self, item_ids=None):
        return self.rows if item_ids is None else self.rows[item_ids]


@pytest.fixture(scope="module")
def split(catalog_config):
    return read_split(catalog_config, NUM_ITEMS)


@pytest.mark.parametrize("mask_history", [False, True], ids=["history kept", "history masked"])
@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize("count", [7, 40, None], ids=lambda count: f"{count or 'all'} users")
def test_ranks_are_those_of_a_small_catalog(count, stage, mask_history, split, device, monkeypatch):
    """Of small integers, whose scores are exact and often tie."""
    rows = torch.randint(-2, 3, (NUM_ITEMS, 5), generator=torch.Generator().manual_seed(0)).float()
    model = Rows(rows).to(device)
    users = None if count is None else split.sample_users(count, seed=3)
    negatives = sample_negatives(split, stage, 20, seed=3, users=users)
    options = {"negatives": negatives, "mask_history": mask_history, "users": users}
    ranks = rank_users(model, split, stage, **options)
    monkeypatch.setattr(config, "LARGE_CATALOG", NUM_ITEMS + 1)
    expected = rank_users(model, split, stage, **options)
    for name in ("users", "targets", "full", "sampled"):
        assert getattr(ranks, name).tolist() == getattr(expected, name).tolist(), name
    assert len(ranks.users) == (count or 120)
    assert any(rank % 1 for rank in ranks.full), "no ties: the test says nothing about them"


@pytest.mark.parametrize("dim", [3, 64, 130])
def test_equal_items_tie_whatever_the_rounding(dim, split, device):
    sids = SemanticIds(torch.zeros(NUM_ITEMS, 3, dtype=torch.int64), codebook_sizes=(4, 4, 4))
    heads = {"num_heads": 1}
    model = build_model("semantic", sids, dim=dim, **heads).to(device)
    negatives = sample_negatives(split, "test", 9)
    ranks = rank_users(model, split, "test", negatives=negatives, mask_history=False)
    assert (ranks.full == (NUM_ITEMS + 1) / 2).all()
    assert (ranks.sampled == 5.5).all()


def test_refuses_what_is_not_finite(split):
    model = Rows(torch.ones(NUM_ITEMS, 4))
    with torch.no_grad():
        model.rows[split.test_targets[0]] = torch.nan
    with pytest.raises(FloatingPointError, match="the model's test scores are not finite"):
        rank_users(model, split, "test")
    model = Rows(torch.ones(NUM_ITEMS, 4))
    unseen = np.setdiff1d(np.arange(NUM_ITEMS), split.log.items)[-1]
    with torch.no_grad():
        model.rows[unseen] = torch.inf
    with pytest.raises(FloatingPointError, match="the model's item vectors are not finite"):
        rank_users(model, split, "test")


def test_progress(split, monkeypatch, capsys):
    done = []
    rank_users(Rows(torch.ones(NUM_ITEMS, 4)), split, "test", progress=done.append)
    assert done == [*range(200, NUM_ITEMS, 200), NUM_ITEMS]
    monkeypatch.setattr(tiled_ranks, "_SAY_EVERY", 0.0)
    tiled_ranks.sweep_progress("sum", NUM_ITEMS)(1000)
    assert capsys.readouterr().out.startswith("sum: ranking, 1,000 of 4,001 items, ")


def test_samples_of_users(split):
    users = split.sample_users(40, seed=1)
    assert len(set(users.tolist())) == 40
    assert (np.diff(users) > 0).all()
    assert (users == split.sample_users(40, seed=1)).all()
    assert (users != split.sample_users(40, seed=2)).any()
    assert split.sample_users(120, seed=1) is None
    assert len(split.sample_users(119, seed=1)) == 119


def test_negatives_of_a_sample(split):
    users = split.sample_users(30, seed=1)
    negatives = sample_negatives(split, "test", 50, seed=4, users=users)
    assert negatives.shape == (30, 50)
    for user, row in zip(users.tolist(), negatives.tolist(), strict=True):
        assert len(set(row)) == 50
        assert not set(row) & set(split.log.items[split.log.offsets[user] : split.log.offsets[user + 1]])


def test_defaults_by_size(monkeypatch):
    monkeypatch.setattr(config, "LARGE_CATALOG", 1000)
    made = TrainConfig(interactions="log.csv", sids="s")
    for num_items, is_sparse, users in ((999, False, None), (1000, True, 10_000)):
        assert made.has_sparse_tables(num_items) is is_sparse
        assert made.num_eval_users(num_items) == users
    given = TrainConfig(interactions="log.csv", sids="s", table_optimizer="adamw", eval_users=5)
    assert not given.has_sparse_tables(1000)
    assert given.num_eval_users(1) == given.num_eval_users(1000) == 5

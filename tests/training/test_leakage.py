"""Nothing that is held out takes part in training: whatever it is, all that is counted and learned stays the same."""

import csv
import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from h2rec import data
from h2rec.training import read_split, train_run


@pytest.fixture(params=["valid", "test"])
def configs(request, make_config, tmp_path):
    """The small log, and one where every validation item, or every test item, is another."""
    config = make_config()
    log = pl.read_parquet(config.interactions).sort("user_id", "timestamp")
    from_end = pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id")  # 1 for the last
    is_changed = (from_end == (2 if request.param == "valid" else 1)) & (pl.len().over("user_id") >= 3)
    shifted = (pl.col("item_id").str.slice(1).cast(pl.Int64) * 7 + 30) % 60
    other_item = pl.concat_str(pl.lit("i"), shifted.cast(pl.String).str.zfill(2))
    changed = log.with_columns(pl.when(is_changed).then(other_item).otherwise("item_id").alias("item_id"))
    assert 50 < (changed["item_id"] != log["item_id"]).sum() <= 90
    changed.write_parquet(tmp_path / "changed.parquet")
    return config, make_config(interactions=str(tmp_path / "changed.parquet"))


def batches(split):
    loader = data.TrainBatches(split, batch_size=16, max_length=8, num_negatives=3, seed=0)
    loader.set_epoch(2)
    return list(loader)


def test_batches_popularity_and_co_occurrence(configs):
    split, other = (read_split(config, 60) for config in configs)
    assert (split.valid_targets != other.valid_targets).any() or (
        split.test_targets != other.test_targets
    ).any()
    for ours, theirs in zip(batches(split), batches(other), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (split.train_counts() == other.train_counts()).all()
    ours, theirs = data.co_occurrence(split), data.co_occurrence(other)
    assert len(ours.neighbours) > 0
    for name in ("offsets", "neighbours", "weights"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax", "bce"])
def test_trained_weights(loss, configs, tmp_path):
    columns, weights, ranks = [], [], []
    for number, config in enumerate(configs):
        config = dataclasses.replace(config, loss=loss, max_epochs=2)
        run = tmp_path / str(number)
        train_run(config, run)
        for name in config.models:
            checkpoint = torch.load(run / name / "checkpoints" / "last.ckpt", weights_only=True)
            weights.append(checkpoint["state_dict"])
            with (run / name / "metrics.csv").open() as file:
                columns += [row["train_loss"] for row in csv.DictReader(file)]
            ranks.append(np.load(run / name / "ranks.npz")["full"])
    half = len(configs[0].models)
    for ours, theirs in zip(weights[:half], weights[half:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert columns[: 2 * half] == columns[2 * half :]
    assert any((a != b).any() for a, b in zip(ranks[:half], ranks[half:], strict=True))

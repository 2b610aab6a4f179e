"""A small log that a model can learn: users walk through the catalog at a pace of their own."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from h2rec import SemanticIds
from h2rec.training import TrainConfig, train_run

NUM_ITEMS, NUM_USERS = 60, 90


def walks(seed: int = 0) -> list[list[int]]:
    """Item ids of each user, oldest first; a user has 1 to 14, so some are too short to be held out."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, NUM_ITEMS, NUM_USERS), rng.integers(1, 15, NUM_USERS)
    return [
        [(start + step * (1 + user % 3)) % NUM_ITEMS for step in range(length)]
        for user, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
    ]


def write_log(path: Path, sequences: Sequence[Sequence[int]]) -> None:
    rows = [
        (f"u{user:02}", f"i{item:02}", step)
        for user, s in enumerate(sequences)
        for step, item in enumerate(s)
    ]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    pl.DataFrame(rows, schema, orient="row").write_parquet(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A folder with a log, a catalog, semantic IDs and content vectors."""
    folder = tmp_path_factory.mktemp("files")
    write_log(folder / "log.parquet", walks())
    ids = [f"i{item:02}" for item in range(NUM_ITEMS)]
    pl.DataFrame({"item_id": ids, "name": [f"Item {i}" for i in ids]}).write_csv(folder / "items.csv")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (NUM_ITEMS, 3), generator=generator)
    SemanticIds(codes, codebook_sizes=(8, 8, 8)).save(folder / "sids.safetensors")
    np.save(folder / "vectors.npy", torch.randn(NUM_ITEMS, 12, generator=generator).numpy())
    return folder


@pytest.fixture(scope="session")
def make_config(files, device) -> Callable[..., TrainConfig]:
    def make(**changes) -> TrainConfig:
        """Every model on the small log, in a second or two."""
        config = TrainConfig(
            interactions=str(files / "log.parquet"),
            sids=str(files / "sids.safetensors"),
            items=str(files / "items.csv"),
            title_column="name",
            dim=8,
            num_layers=1,
            num_heads=2,
            max_length=8,
            batch_size=32,
            learning_rate=0.01,
            max_epochs=3,
            ranking_negatives=20,
            accelerator="cpu" if device == "cpu" else "gpu",
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def finished_run(make_config, files, tmp_path_factory) -> Path:
    """All four models, from content vectors; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train_run(make_config(embeddings=str(files / "vectors.npy")), run)
    return run

"""The code around the kernels has its tensors where a GPU wants them; see `pretended_gpu`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
from pretended_gpu import pretended_gpu

from h2rec import SemanticIds, layers, ops
from h2rec.optim import RowwiseAdagrad
from h2rec.tokenizers import RQVAE, ProductQuantizer, RQKMeans, quality_report
from h2rec.training import TrainConfig, train_run

NUM_ITEMS = 30


@pytest.fixture
def waits(monkeypatch):
    for name, value in {"device_count": 1, "get_device_capability": (8, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("set_device", "empty_cache", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    with pretended_gpu() as waits:
        yield waits


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(5)[x.long()],
        lambda x: x.numpy(),
        lambda x: torch.randint(3, (2,), device=x.device, generator=torch.Generator()),
        lambda x: torch.mm(x[:, None], x[None], out=torch.empty(3, 3)),
    ],
    ids=["add", "cat", "index", "numpy", "generator", "out"],
)
def test_mixing_devices_is_found(waits, mix):
    with pytest.raises((RuntimeError, TypeError)):
        mix(torch.ones(3, device="cuda"))


def sids(dim: int = 8) -> SemanticIds:
    codes = torch.arange(3 * NUM_ITEMS).view(-1, 3) % 6
    return SemanticIds(codes, codebook_sizes=(6, 6, 6), codebooks=torch.ones(3, 6, dim))


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    rows = [(user, (user + step) % NUM_ITEMS, step) for user in range(20) for step in range(3 + user % 4)]
    pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row").write_parquet(
        tmp_path / "log.parquet"
    )
    sids().save(tmp_path / "sids.safetensors")
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(NUM_ITEMS, 5)))
    return TrainConfig(
        interactions=str(tmp_path / "log.parquet"),
        sids=str(tmp_path / "sids.safetensors"),
        embeddings=str(tmp_path / "vectors.npy"),
        models=("h2rec",),
        dim=8,
        max_length=4,
        max_epochs=1,
        ranking_negatives=5,
        accelerator="gpu",
    )


PAPER = {"mixing": "attention", "share_backbone": True, "alignment_weight": 0.1, "granularity_weight": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        {"models": ("sum", "h2rec"), "mask_history": False},
        {"loss": "bce", **PAPER},
        {"loss": "sampled_softmax", "table_optimizer": "rowwise_adagrad"},
        {"loss": "sampled_softmax", "target_smoothing": 0.0, "backbone": "bert4rec"},
    ],
    ids=["full softmax", "paper", "sparse table", "no smoothing"],
)
def test_run(waits, config, settings, tmp_path):
    metrics = train_run(TrainConfig.from_dict(vars(config) | settings), tmp_path / "run")
    assert metrics["models"]["h2rec"]["epochs"] == 1


def layers_of_codes() -> list[torch.nn.Module]:
    given = sids()
    return [
        layers.HashEmbedding(NUM_ITEMS, 8, mode="multi", num_buckets=7),
        layers.SemanticEmbedding(given, 8),
        layers.SemanticEmbedding(given, 8, pooling="prefix", num_buckets=7),
        layers.HarmonizedEmbedding(given, 8),
    ]


def test_layers_are_made_on_the_default_device(waits):
    with torch.device("cuda"):
        made = layers_of_codes()
    for layer in made:
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cuda"}
        layer(torch.arange(NUM_ITEMS, device="cuda")).sum().backward()


def test_tensors_on_the_host_are_served_where_the_default_device_is_a_gpu(waits):
    vectors = torch.randn(200, 8)
    with torch.device("cuda"):
        codes = RQKMeans(2, 6, num_iters=3).fit(vectors).tokenize(vectors)
        quality_report(codes.append(vectors[:3]), torch.cat([vectors, vectors[:3]]))
        ops.alignment_loss(vectors, vectors)
        layers.GranularityCrossAttention(8, 2, dropout=0.5).dropout(vectors)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("make", [RQKMeans, ProductQuantizer])
def test_fit_goes_on_from_a_checkpoint(waits, make: Callable, tmp_path):
    vectors = torch.randn(200, 8).to("cuda")

    def interrupt(level: int, *_: float) -> None:
        if level == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        make(3, 6, num_iters=3).fit(vectors, interrupt, tmp_path)
    for _ in range(2):  # from the first level, and from all of them
        tokenizer = make(3, 6, num_iters=3).fit(vectors, checkpoint=tmp_path)
        assert all(codebook.is_cuda for codebook in tokenizer.codebooks)
        assert tokenizer.tokenize(vectors).num_items == 200


@pytest.mark.parametrize(
    "options", [{}, {"codebooks": "gradient", "sinkhorn": 0.05}], ids=["ema", "gradient"]
)
def test_rq_vae_does_not_wait_in_training(waits, options):
    vectors = torch.randn(200, 8)
    model = RQVAE(8, 2, 6, latent_dim=4, hidden=(8,), **options).to("cuda")
    model.fit(vectors, num_epochs=1, batch_size=100).tokenize(vectors)
    batch = vectors.to("cuda")
    waits.clear()
    model.train()(batch)[2].backward()
    assert not waits


def test_table_in_rows_refuses_ids_out_of_range(waits, tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer = layers.RowShardedEmbedding(layers.HashEmbedding(9, 4, sparse=True)).to("cuda")
        optimizer = RowwiseAdagrad(layer.parameters())
        layer(torch.tensor([1, 8], device="cuda")).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match=r"item_ids must lie in \[0, 9\), but 1 of 2 do not"):
            layer(torch.tensor([1, 9], device="cuda"))
    finally:
        dist.destroy_process_group()

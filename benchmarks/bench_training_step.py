"""One step of training: users, next-item loss with a negative per position, auxiliary losses, backward, Adam."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from h2rec import SemanticIds
from h2rec.data import SequenceBatch
from h2rec.models import SequentialModel, build_model
from h2rec.testing import zipf_ids
from h2rec.training.losses import binary_cross_entropy

BASELINE = "SASRec on nn.Embedding"
NAMES = ("hash", "semantic", "sum", "h2rec")


class Shape(NamedTuple):
    B: int  # sequences, all of full length
    T: int  # positions
    D: int
    L: int  # levels
    K: int  # codewords per level
    N: int  # items


class Losses(NamedTuple):
    column: str
    next_item: float
    total: float


@pytest.mark.shapes(
    small=[Shape(32, 20, 32, 4, 64, 2_000)],
    paper=[Shape(128, 200, 64, 4, 128, 20_000), Shape(256, 50, 64, 4, 128, 20_000)],
    production=[Shape(256, 50, 64, 4, 256, 1_000_000)],
)
def bench_step(compare, shape, device):
    """The models do different work; the ratios say what each costs beside SASRec as it is mostly written."""
    generator = torch.Generator().manual_seed(0)
    batch = _full_batch(shape, generator, device)
    codes = torch.randint(shape.K, (shape.N, shape.L), generator=generator)
    sids = SemanticIds(codes, codebook_sizes=(shape.K,) * shape.L)
    models = {name: build_model(name, sids, dim=shape.D, max_length=shape.T) for name in NAMES}
    models = {BASELINE: _on_nn_embedding(models["hash"], shape), **models}
    calls = {name: _training_step(name, model.to(device), batch) for name, model in models.items()}
    compare(calls, baseline=BASELINE, agree=_agree, memory=True)


def _agree(losses: Losses, expected: Losses) -> None:
    """The same model on our table has the same first loss; the others start as near to two coin flips as it does."""
    if losses.column == "hash":
        torch.testing.assert_close(losses[1:], expected[1:])
    else:
        torch.testing.assert_close(losses.next_item, expected.next_item, rtol=0.05, atol=0)
    assert losses.total >= losses.next_item


def _full_batch(shape: Shape, generator: torch.Generator, device: torch.device) -> SequenceBatch:
    items = zipf_ids([shape.B, shape.T + 1], shape.N, generator)
    batch = SequenceBatch(
        user_ids=torch.arange(shape.B),
        item_ids=items[:, :-1].contiguous(),
        lengths=torch.full((shape.B,), shape.T),
        targets=items[:, 1:].contiguous(),
        negatives=torch.randint(shape.N, (shape.B, shape.T, 1), generator=generator),
    )
    return SequenceBatch(*(tensor.to(device) for tensor in batch))


def _on_nn_embedding(hash_model: SequentialModel, shape: Shape) -> SequentialModel:
    """The same model, starting from the same numbers, with one more row for the padding."""
    table = nn.Embedding(shape.N + 1, shape.D, padding_idx=shape.N)
    (weight,) = hash_model.embedding.parameters()
    table.weight.data[: shape.N] = weight.detach()
    model = copy.deepcopy(hash_model)
    model.embedding = table
    return model


def _training_step(column: str, model: SequentialModel, batch: SequenceBatch) -> Callable[[], Losses]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> Losses:
        torch.manual_seed(0)  # the same dropout in every column
        optimizer.zero_grad()
        users, auxiliary = model.training_outputs(batch)
        targets, negatives = (
            model.item_vectors(ids).flatten(0, 1) for ids in (batch.targets, batch.negatives)
        )
        next_item = binary_cross_entropy(users.flatten(0, 1), targets, negatives)
        total = next_item + sum(auxiliary.values())
        total.backward()
        optimizer.step()
        return Losses(column, next_item.item(), total.item())

    return step

"""One step of training a table: lookup, backward, and the optimizer on the rows of the batch or on all."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from h2rec.layers import HashEmbedding
from h2rec.optim import RowwiseAdagrad
from h2rec.testing import zipf_ids


class Shape(NamedTuple):
    T: int  # ids, Zipf-distributed
    D: int
    R: int  # rows


OPTIMIZERS = {
    "Adam, dense": lambda table: torch.optim.Adam([table], fused=True),
    "SparseAdam": lambda table: torch.optim.SparseAdam([table]),
    "RowwiseAdagrad": lambda table: RowwiseAdagrad([table]),
}


@pytest.mark.shapes(
    small=[Shape(2_000, 32, 50_000)],
    paper=[Shape(25_600, 64, 20_000), Shape(25_600, 64, 1_000_000)],
    production=[Shape(200_000, 64, 4_000_000)],
)
def bench_step(compare, shape, device):
    """The optimizers do different work; they agree on which rows move."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape.R, shape.D, generator=generator)
    item_ids = zipf_ids([shape.T], shape.R, generator).to(device)
    cotangent = torch.randn(shape.T, shape.D, generator=generator).to(device)

    def step(name: str):
        layer = HashEmbedding(shape.R, shape.D, sparse="dense" not in name).to(device)
        layer.load_state_dict({"table.weight": start})
        optimizer = OPTIMIZERS[name](layer.weight)

        def call() -> Tensor:
            layer(item_ids).backward(cotangent)
            optimizer.step()
            optimizer.zero_grad()
            return layer.weight

        return call

    def agree(table: Tensor, expected: Tensor) -> None:
        moved = [(tensor.detach().cpu() != start).any(1) for tensor in (table, expected)]
        assert torch.equal(*moved)
        assert moved[0].sum() == len(item_ids.unique())

    compare({name: step(name) for name in OPTIMIZERS}, baseline="SparseAdam", agree=agree, memory=True)

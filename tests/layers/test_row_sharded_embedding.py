"""A table over several processes gives the vectors and the gradient of the whole one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from h2rec.layers import HashEmbedding, RowShardedEmbedding
from h2rec.optim import RowwiseAdagrad

NUM_ITEMS, D, T = 50, 3, 2
LAYERS = {
    "direct": lambda: HashEmbedding(NUM_ITEMS, D),
    "padded sparse": lambda: HashEmbedding(NUM_ITEMS, D, padding_idx=7, sparse=True),
    "multi": lambda: HashEmbedding(NUM_ITEMS, D, mode="multi", num_buckets=31, num_hashes=3),
    "qr sparse": lambda: HashEmbedding(NUM_ITEMS, D, mode="qr", num_buckets=27, sparse=True),
}
# Of each process in each step: uneven, none, and one that has all.
STEPS = ((5, 0, 3, 1), (2, 9, 4, 4), (0, 3, 0, 0))


def dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def check_as_whole(name: str, rank: int, count: int) -> None:
    torch.manual_seed(0)
    whole = LAYERS[name]().double()
    sharded = RowShardedEmbedding(whole)
    weight, table = sharded.table.weight, whole.hash_table
    rows = slice(sharded.first_row, sharded.first_row + len(weight))
    generator = torch.Generator().manual_seed(0)
    optimizers = []
    if whole.table.sparse:
        optimizers = [RowwiseAdagrad([part], lr=0.1, in_backward=False) for part in (weight, table)]
    for sizes in STEPS:
        ids = [torch.randint(0, NUM_ITEMS, (size, T), generator=generator) for size in sizes[:count]]
        cotangents = [torch.randn(size, T, D, generator=generator).double() for size in sizes[:count]]
        output = sharded(ids[rank])
        assert torch.equal(output, whole(ids[rank])), name
        (output * cotangents[rank]).sum().backward()
        losses = [(whole(part) * cotangent).sum() for part, cotangent in zip(ids, cotangents, strict=True)]
        (sum(losses) / count).backward()
        assert weight.grad.is_sparse == whole.table.sparse, name
        torch.testing.assert_close(dense(weight.grad), dense(table.grad)[rows])
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(weight, table[rows])
        weight.grad = table.grad = None


def check_all_hear_of_bad_ids(rank: int, count: int) -> None:
    """None waits for the one that refuses its ids, and the layer works afterwards."""
    torch.manual_seed(0)
    layer = HashEmbedding(NUM_ITEMS, D)
    sharded = RowShardedEmbedding(layer)
    other = rf"item_ids: expected legal ids in all processes, got others in \[{count - 1}\]"
    bad = (torch.tensor([3, 50]), ValueError, r"item_ids must lie in \[0, 50\)")
    no_integers = (torch.tensor([3.0]), TypeError, "item_ids must be an integer tensor, got torch.float32")
    for ids, error, message in (bad, no_integers):
        if rank != count - 1:
            ids, error, message = torch.tensor([1, 2, 49]), ValueError, other
        with pytest.raises(error, match=message):
            sharded(ids)
        with pytest.raises(ValueError, match=r"item_ids must lie in \[0, 50\)"):  # each says its own
            sharded(torch.tensor([-1 - rank]))
        ids = torch.arange(rank, NUM_ITEMS, count)
        assert torch.equal(sharded(ids), layer(ids))


def one_rank(rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=count)
    try:
        for name in LAYERS:
            check_as_whole(name, rank, count)
        with torch.device("meta"):
            nowhere = HashEmbedding(1001, D)
        assert RowShardedEmbedding(nowhere).table.weight.std().sub(1).abs() < 0.2
        with pytest.raises(
            ValueError, match=f"group: expected processes that get a row .* of 1, .*got {count}"
        ):
            RowShardedEmbedding(HashEmbedding(1, D))
        check_all_hear_of_bad_ids(rank, count)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of gloo outlive the group; Python aborts if one lets go of a tensor while it ends


@pytest.mark.parametrize("count", [2, 4])
def test_as_the_whole_table(count, tmp_path):
    mp.spawn(one_rank, (count, str(tmp_path / "store")), nprocs=count)

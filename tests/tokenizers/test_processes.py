"""K-means in several processes ends with the bits of one."""

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from h2rec.ops import kmeans
from h2rec.tokenizers import ProductQuantizer, RQKMeans, open_vectors

# Not a multiple of anything, and of such different sizes that sums depend on their order.
X = torch.randn(997, 12, generator=torch.Generator().manual_seed(0))
X *= torch.logspace(-3, 3, 997)[torch.randperm(997, generator=torch.Generator().manual_seed(1)), None]
SIZES = {"codebook_size": (8, 4, 5), "num_iters": 12, "batch_size": 64}
TOKENIZERS: dict[str, Callable[[], RQKMeans | ProductQuantizer]] = {
    "lloyd": partial(RQKMeans, 3, **SIZES),
    "balance": partial(RQKMeans, 3, balance=0.3, **SIZES),
    "mini-batch": partial(RQKMeans, 3, mini_batch=True, **SIZES),
    "mini-batch balance": partial(RQKMeans, 3, mini_batch=True, balance=0.3, **SIZES),
    "pq": partial(ProductQuantizer, 3, **SIZES),
}
SHARED_ROWS = 7  # of a mini-batch of 64: ten parts


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that this process has put into sums, where processes share them, from now on."""
    rows, add = [0], kmeans._Sums.add

    def counted(self: kmeans._Sums, batch: torch.Tensor, codes: torch.Tensor) -> None:
        if self.bounds is not None:
            rows[0] += len(batch)
        add(self, batch, codes)

    monkeypatch.setattr(kmeans._Sums, "add", counted)
    return rows


def one_rank(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store-{count}", rank=rank, world_size=count)
    kmeans._SHARED_ROWS = SHARED_ROWS
    rows = count_rows(pytest.MonkeyPatch())
    try:
        for name, make in TOKENIZERS.items():
            for source, vectors in (("memory", X), ("file", open_vectors(f"{folder}/x.npy"))):
                result = f"{folder}/{name}-{source}-{count}"
                rows[0] = 0
                tokenizer = make().fit(vectors, group=dist.group.WORLD, checkpoint=f"{result}-kept")
                torch.save((tokenizer.codebooks, rows[0]), f"{result}-{rank}.pt")
                # Goes on with what the first process kept, whatever the others see.
                kept = f"{result}-kept" if rank == 0 else f"{folder}/nothing"
                again = make().fit(vectors, group=dist.group.WORLD, checkpoint=kept)
                for ours, theirs in zip(again.codebooks, tokenizer.codebooks, strict=True):
                    assert torch.equal(ours, theirs), result
        with pytest.raises(ValueError, match=r"1 of 997 rows hold NaN or infinity \(row 70\)"):
            TOKENIZERS["lloyd"]().fit(X.index_fill(0, torch.tensor([70]), torch.nan), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of gloo outlive the group; Python aborts if one lets go of a tensor while it ends


@pytest.mark.parametrize("count", [2, 4])
def test_the_codebooks_of_one_process(count, tmp_path, monkeypatch):
    monkeypatch.setattr(kmeans, "_SHARED_ROWS", SHARED_ROWS)
    np.save(tmp_path / "x.npy", X.numpy())
    mp.spawn(one_rank, (count, str(tmp_path)), nprocs=count)
    rows = count_rows(monkeypatch)
    for name, make in TOKENIZERS.items():
        rows[0] = 0
        alone = make().fit(X)
        for source in ("memory", "file"):
            results = [
                torch.load(tmp_path / f"{name}-{source}-{count}-{rank}.pt", weights_only=True)
                for rank in range(count)
            ]
            for codebooks, _ in results:
                for ours, theirs in zip(codebooks, alone.codebooks, strict=True):
                    assert torch.equal(ours, theirs), (name, source)
            shares = [share for _, share in results]
            assert sum(shares) == rows[0], (name, source)
            assert max(shares) < 1.4 * rows[0] / count, (name, source)

"""K-means in several processes ends with the bits of one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from h2rec.tokenizers import RQKMeans, open_vectors

# Not a multiple of anything, and of such different sizes that sums depend on their order.
X = torch.randn(997, 12, generator=torch.Generator().manual_seed(0))
X *= torch.logspace(-3, 3, 997)[torch.randperm(997, generator=torch.Generator().manual_seed(1)), None]
SETTINGS = ({}, {"balance": 0.3})


def make(settings: dict) -> RQKMeans:
    return RQKMeans(3, (8, 4, 5), num_iters=12, batch_size=64, **settings)


def one_rank(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store-{count}", rank=rank, world_size=count)
    try:
        for number, settings in enumerate(SETTINGS):
            for name, vectors in (("memory", X), ("file", open_vectors(f"{folder}/x.npy"))):
                tokenizer = make(settings).fit(
                    vectors, group=dist.group.WORLD, checkpoint=f"{folder}/kept-{number}-{name}-{count}"
                )
                torch.save(tokenizer.codebooks, f"{folder}/{number}-{name}-{count}-{rank}.pt")
                # Goes on with what the first process kept, whatever the others see.
                kept = f"{folder}/kept-{number}-{name}-{count}" if rank == 0 else f"{folder}/nothing"
                again = make(settings).fit(vectors, group=dist.group.WORLD, checkpoint=kept)
                for ours, theirs in zip(again.codebooks, tokenizer.codebooks, strict=True):
                    assert torch.equal(ours, theirs), (number, name)
        with pytest.raises(ValueError, match="mini_batch does not go with group"):
            make({"mini_batch": True}).fit(X, group=dist.group.WORLD)
        with pytest.raises(ValueError, match=r"1 of 997 rows hold NaN or infinity \(row 70\)"):
            make({}).fit(X.index_fill(0, torch.tensor([70]), torch.nan), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 4])
def test_the_codebooks_of_one_process(count, tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    mp.spawn(one_rank, (count, str(tmp_path)), nprocs=count)
    for number, settings in enumerate(SETTINGS):
        alone = make(settings).fit(X)
        for name in ("memory", "file"):
            for rank in range(count):
                codebooks = torch.load(tmp_path / f"{number}-{name}-{count}-{rank}.pt", weights_only=True)
                for ours, theirs in zip(codebooks, alone.codebooks, strict=True):
                    assert torch.equal(ours, theirs), (number, name, rank)

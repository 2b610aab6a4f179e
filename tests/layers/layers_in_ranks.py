"""Run by test_distributed.py: every check in each of two processes, on its half of one batch."""

import copy
import os
import sys
import traceback
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from h2rec import SemanticIds
from h2rec.layers import (
    AlignmentLoss,
    GranularityCrossAttention,
    GranularityFusion,
    HarmonizedEmbedding,
    HashEmbedding,
    MaskedGranularityLoss,
    ResidualQuantizer,
    SemanticEmbedding,
)
from h2rec.optim import RowwiseAdagrad

RANKS, B, T, L, K, D, NUM_ITEMS = 2, 6, 3, 3, 5, 4, 20
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(batch: Tensor) -> Tensor:
    return batch.chunk(RANKS)[dist.get_rank()]


def item_ids() -> Tensor:
    return torch.randint(0, NUM_ITEMS, (B, T), generator=torch.Generator().manual_seed(0))


def equal_on_ranks(tensor: Tensor) -> bool:
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


def twice(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same module twice, the first to be wrapped; it starts differently on each rank, as DDP must not mind."""
    torch.manual_seed(dist.get_rank())
    module = make().double()
    torch.manual_seed(0)
    return module, make().double()


def assert_averaged(
    make: Callable[[], nn.Module], loss_of: Callable[[nn.Module, Callable[[Tensor], Tensor]], Tensor]
) -> None:
    """DDP on halves of the batch gives the gradients of one process on all of it."""
    module, single = twice(make)
    wrapped = DistributedDataParallel(module)
    loss_of(wrapped, mine).backward()
    loss_of(single, lambda batch: batch).backward()
    for (name, ours), theirs in zip(module.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.grad.is_sparse == theirs.grad.is_sparse, name
        ours, theirs = (p.grad.to_dense() if p.grad.is_sparse else p.grad for p in (ours, theirs))
        torch.testing.assert_close(ours, theirs)
        assert ours.any(), name


def sids() -> SemanticIds:
    codes = torch.randint(0, K, (NUM_ITEMS, L), generator=torch.Generator().manual_seed(0))
    return SemanticIds(codes, codebook_sizes=(K,) * L)


EMBEDDINGS = {
    "hash": lambda: HashEmbedding(NUM_ITEMS, D),
    "hash_sparse": lambda: HashEmbedding(NUM_ITEMS, D, sparse=True),
    "semantic": lambda: SemanticEmbedding(sids(), D),
    "prefix_sparse": lambda: SemanticEmbedding(sids(), D, pooling="prefix", num_buckets=9, sparse=True),
    "harmonized": lambda: HarmonizedEmbedding(sids(), D),
    "harmonized_sparse": lambda: HarmonizedEmbedding(sids(), D, fusion="gate", mode="qr", sparse=True),
}


def embedding_loss(layer: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
    return (layer(part(item_ids())) * part(random(B, T, D))).flatten(1).sum(1).mean()


@check
def embeddings() -> None:
    for make in EMBEDDINGS.values():
        assert_averaged(make, embedding_loss)


@check
def sparse_optimizers() -> None:
    """Tables stay equal on all ranks, and become what one process makes of them."""
    optimizers = (
        lambda table: torch.optim.SparseAdam([table], lr=0.1),
        lambda table: RowwiseAdagrad([table], lr=0.1, in_backward=False),
    )
    for name in ("hash_sparse", "prefix_sparse", "harmonized_sparse"):
        for make_optimizer in optimizers:
            module, single = twice(EMBEDDINGS[name])
            wrapped = DistributedDataParallel(module)
            for layer, part in ((wrapped, mine), (single, lambda batch: batch)):
                optimizer = make_optimizer(getattr(layer, "module", layer).hash_table)
                for _ in range(3):
                    layer.zero_grad()
                    embedding_loss(layer, part).backward()
                    optimizer.step()
            torch.testing.assert_close(module.hash_table, single.hash_table)
            assert equal_on_ranks(module.hash_table)


@check
def an_update_before_averaging_is_refused() -> None:
    module = EMBEDDINGS["hash_sparse"]().double()
    wrapped = DistributedDataParallel(module)
    RowwiseAdagrad([module.hash_table])
    with pytest.raises(RuntimeError, match="sparse gradient"):
        embedding_loss(wrapped, mine).backward()


@check
def granularity_layers() -> None:
    assert_averaged(
        lambda: GranularityCrossAttention(D, L),
        lambda layer, part: sum(
            (output * part(random(*output.shape[:0], B, *output.shape[1:], seed=2))).flatten(1).sum(1).mean()
            for output in layer(part(random(B, T, L, D)), part(random(B, T, D, seed=1)))
        ),
    )
    assert_averaged(
        lambda: GranularityFusion(D, L, "adaptive"),
        lambda layer, part: (layer(part(random(B, T, L, D))) * part(random(B, T, D))).mean(),
    )


class Masked(nn.Module):
    """The loss of users that are the mean of their sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MaskedGranularityLoss(D, L)

    def forward(self, levels: Tensor, gates: Tensor) -> Tensor:
        masked, full = self.loss.mix(levels, gates)
        return self.loss(masked.mean(1), full.mean(1))


@check
def masked_granularity_loss() -> None:
    """Each rank has the loss of its own users; DDP averages."""
    module, single = twice(Masked)
    wrapped = DistributedDataParallel(module)
    wrapped(mine(random(B, T, L, D)), mine(random(B, L))).backward()
    halves = zip(random(B, T, L, D).chunk(RANKS), random(B, L).chunk(RANKS), strict=True)
    (sum(single(levels, gates) for levels, gates in halves) / RANKS).backward()
    torch.testing.assert_close(module.loss.mask_vectors.grad, single.loss.mask_vectors.grad)


class Aligned(nn.Module):
    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.embedding = HarmonizedEmbedding(sids(), D, fusion="none", sparse=True)
        self.loss = AlignmentLoss(0.5, learn_temperature=True, min_shared_codes=2, group=group)

    def forward(self, items: Tensor) -> Tensor:
        semantic, hashed = self.embedding(items)
        return self.loss(hashed, semantic, item_ids=items, codes=self.embedding.codes[items])


@check
def alignment_loss() -> None:
    """With a group every rank has the loss, and after averaging the gradients, of the whole batch."""
    torch.manual_seed(0)
    module = Aligned(dist.group.WORLD).double()
    torch.manual_seed(0)
    single = Aligned(None).double()
    items = item_ids().flatten()
    wrapped = DistributedDataParallel(module)
    ours, theirs = wrapped(mine(items)), single(items)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for a, b in zip(module.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense())


class AutoEncoder(nn.Module):
    def __init__(self, dead_code_threshold: float) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.quantizer = ResidualQuantizer(D, L, K, ema_decay=0.5, dead_code_threshold=dead_code_threshold)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, commitment = self.quantizer(self.encoder(x))
        return (quantized - x).square().mean() + commitment


def train_quantizer(model: nn.Module, part: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(5):
        optimizer.zero_grad()
        model(part(random(B, D, seed=seed))).backward()
        optimizer.step()


@check
def running_means() -> None:
    """They are those of one process on the whole batch, even without DDP's broadcast of buffers."""
    torch.manual_seed(0)
    module = AutoEncoder(dead_code_threshold=0.0).double()
    single = copy.deepcopy(module)
    train_quantizer(DistributedDataParallel(module, broadcast_buffers=False), mine)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        train_quantizer(single, lambda batch: batch)
    for ours, theirs in zip(module.buffers(), single.buffers(), strict=True):
        assert equal_on_ranks(ours)
        torch.testing.assert_close(ours, theirs)


@check
def revived_codewords() -> None:
    """Every rank puts the same vectors in the place of unused codewords, though each draws from its own batch."""
    torch.manual_seed(0)
    module = AutoEncoder(dead_code_threshold=0.4).double()
    before = module.quantizer.packed_codebooks.clone()
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)
    torch.manual_seed(dist.get_rank())
    train_quantizer(wrapped, mine)
    assert not torch.isclose(module.quantizer.packed_codebooks, before).all(1).any()
    for buffer in module.buffers():
        assert equal_on_ranks(buffer)


def one_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for name, function in CHECKS.items():
        try:
            function()
        except Exception:
            print(f"{name}: failed in rank {rank}\n{traceback.format_exc()}", flush=True)
            raise
        dist.barrier()
        if rank == 0:
            print(f"{name}: passed", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo outlive the group; Python aborts if one lets go of a tensor while it ends


if __name__ == "__main__":
    mp.spawn(one_rank, (sys.argv[1],), nprocs=RANKS)

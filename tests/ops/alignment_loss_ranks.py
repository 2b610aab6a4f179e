"""Run by test_alignment_loss.py: one process per count of rows, each with its part of one batch."""

import os
import sys
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from h2rec import ops

DIM, CODES = 6, 3


def one_rank(rank: int, rendezvous: str, counts: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(counts))
    total, start = sum(counts), sum(counts[:rank])
    mine = slice(start, start + counts[rank])
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(total, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 4, DIM, generator=generator, dtype=torch.float64)
    item_ids = torch.randint(0, total, (total,), generator=generator)
    codes = torch.randint(0, 2, (total, CODES), generator=generator)
    pair_index = torch.randint(0, total, (2, 7), generator=generator)
    pair_weight = torch.rand(7, generator=generator) * 0.5 + 0.5

    def loss_and_grads(rows: slice, pairs: slice, group):
        leaves = [w.clone().requires_grad_() for w in weights]
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = ops.alignment_loss(
            features[rows] @ leaves[0],
            features[rows] @ leaves[1],
            item_ids=item_ids[rows],
            codes=codes[rows],
            min_shared_codes=2,
            pair_index=pair_index[:, pairs],
            pair_weight=pair_weight[pairs],
            temperature=temperature,
            group=group,
        )
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in (*leaves, temperature)]

    pairs = slice(rank, None, len(counts))  # uneven too
    operator = sys.modules[ops.alignment_loss.__module__]
    with mock.patch.object(operator, "_alignment_loss", wraps=operator._alignment_loss) as forward:
        loss, grads = loss_and_grads(mine, pairs, dist.group.WORLD)
    assert forward.call_args.args[-2:] == (start, counts[rank])  # its own rows, and no others
    for grad in grads:  # as DDP does
        dist.all_reduce(grad)
        grad /= len(counts)
    torch.testing.assert_close((loss, grads), loss_and_grads(slice(None), slice(None), None))
    print("equal to one process", flush=True)

    try:
        width = 5 if rank == 0 else 4
        ops.alignment_loss(torch.ones(2, width), torch.ones(2, width), group=dist.group.WORLD)
    except ValueError as error:
        print(error, flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo outlive the group; Python aborts if one lets go of a tensor while it ends


if __name__ == "__main__":
    counts = [int(count) for count in sys.argv[2:]]
    mp.spawn(one_rank, (sys.argv[1], counts), nprocs=len(counts))

"""Rows of all ranks of a process group, in the order of ranks; uneven counts are legal."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n_rank, ...]`` of each rank to ``[sum of n_rank, ...]`` on every rank.

    The gradient of a rank's own rows is taken from the result's and multiplied by the number of ranks: the caller
    computes the same function of all rows on every rank, so nothing need be exchanged, and the average over ranks
    that data parallelism takes of parameter gradients becomes their sum.

    Raises:
        ValueError: the ranks disagree on the width or the dtype of a row; every rank says so.
    """
    return _GatherRows.apply(rows, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        world_size = group.size()
        width = math.prod(rows.shape[1:])
        mine = torch.tensor([rows.shape[0], width, rows.itemsize], device=rows.device)
        shapes = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(shapes, mine, group=group)
        counts, widths, sizes = torch.stack(shapes).T.tolist()
        if len(set(widths)) > 1 or len(set(sizes)) > 1:
            raise ValueError(
                f"the ranks of group must agree on the rows' width and dtype, got widths {widths} "
                f"and elements of {sizes} bytes"
            )
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        ctx.start = sum(counts[: group.rank()])
        ctx.count, ctx.world_size = rows.shape[0], world_size
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.start : ctx.start + ctx.count] * ctx.world_size, None

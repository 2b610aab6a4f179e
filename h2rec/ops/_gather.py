"""Rows of all ranks of a process group, in the order of ranks; uneven counts are legal."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(
    tensors: Sequence[Tensor | None], group: dist.ProcessGroup
) -> tuple[list[Tensor | None], list[int]]:
    """Each ``[n_rank, ...]`` to ``[sum of n_rank, ...]`` on every rank, without a gradient.

    Returns:
        The whole tensors, and how many rows of the first one each rank has.

    Raises:
        ValueError: the ranks disagree on the width or the dtype of a row, or on which tensors are None; every rank
            says so.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    mine = torch.tensor([_layout(tensor) for tensor in tensors], device=device)
    layouts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(layouts, mine, group=group)
    counts, widths, sizes = torch.stack(layouts, dim=2).unbind(1)  # [tensors, ranks] each
    for width, size in zip(widths.tolist(), sizes.tolist(), strict=True):
        if len(set(width)) > 1 or len(set(size)) > 1:
            raise ValueError(
                f"the ranks of group must agree on the rows' width and dtype, got widths {width} "
                f"and elements of {size} bytes (0: not given)"
            )
    counts = counts.tolist()
    whole = [
        None if tensor is None else _gather(tensor, rows, group)
        for tensor, rows in zip(tensors, counts, strict=True)
    ]
    return whole, counts[0]


def _layout(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (len(tensor), math.prod(tensor.shape[1:]), tensor.itemsize)


def _gather(rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

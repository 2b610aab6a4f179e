"""Sums of gradients by the row that was read: sorted, in fixed order, without atomics. The same bits in every run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, as_stored, on_device_of, tile_elements

# Sorted entries that one sum runs over at most: longer runs of a row are summed in pieces.
_PIECE = 32


@triton.jit
def _sum_pieces_kernel(
    grad_ptr, order_ptr, targets_ptr, starts_ptr, out_ptr, partials_ptr, num_entries, num_targets, num_pieces,
    GRAD_STRIDE: tl.constexpr, LEVEL_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr, DIM: tl.constexpr,
    PIECE: tl.constexpr, SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[target] = SCALE * sum of the gradients of its entries, or partials[...] = the sum of a piece of them.

    Piece p is the entries [starts[p], starts[p + 1]) of one target, and crosses no multiple of PIECE. A program sums
    BLOCK_P pieces [BP]. Entry e is level e % PER_TOKEN of token e // PER_TOKEN.
    """
    pieces = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = (columns < DIM)[None, :]
    starts = tl.load(starts_ptr + pieces, mask=pieces < num_pieces, other=num_entries)
    stops = tl.load(starts_ptr + pieces + 1, mask=pieces < num_pieces, other=num_entries)
    targets = tl.load(targets_ptr + starts, mask=starts < num_entries, other=num_targets)
    exists = targets < num_targets
    lengths = tl.where(exists, stops - starts, 0)

    total = tl.zeros([BLOCK_P, BLOCK_D], SUM_DTYPE)
    for i in range(tl.max(lengths, 0)):
        in_piece = i < lengths
        entries = tl.load(order_ptr + starts + i, mask=in_piece, other=0)
        offsets = (entries // PER_TOKEN) * GRAD_STRIDE + (entries % PER_TOKEN) * LEVEL_STRIDE
        rows = tl.load(
            grad_ptr + offsets[:, None] + columns[None, :], mask=in_piece[:, None] & column_mask, other=0.0
        )
        total += rows.to(SUM_DTYPE)

    before = tl.load(targets_ptr + starts - 1, mask=exists & (starts > 0), other=num_targets)
    after = tl.load(targets_ptr + stops, mask=exists & (stops < num_entries), other=num_targets)
    whole = exists & (before != targets) & (after != targets)
    out = out_ptr + targets.to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(out, as_stored(total * SCALE, out_ptr.dtype.element_ty), mask=whole[:, None] & column_mask)
    slots = 2 * (starts // PIECE) + (starts % PIECE != 0).to(tl.int64)
    partials = partials_ptr + slots[:, None] * DIM + columns[None, :]
    tl.store(partials, total, mask=(exists & ~whole)[:, None] & column_mask)


@triton.jit
def _join_pieces_kernel(
    targets_ptr, out_ptr, partials_ptr, num_entries, num_targets, num_chunks,
    DIM: tl.constexpr, PIECE: tl.constexpr, SCALE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[target] = SCALE * sum of the pieces of the target whose entries begin in this program's chunk and leave it.

    Chunk c is the entries [c * PIECE, (c + 1) * PIECE). partials[2 * c] is the piece that begins with the chunk,
    partials[2 * c + 1] one that begins inside it and reaches its end.
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_mask = columns < DIM
    start, stop = chunk * PIECE, (chunk + 1) * PIECE
    if stop < num_entries:
        target = tl.load(targets_ptr + stop - 1)
        before = tl.load(targets_ptr + start - 1, mask=chunk > 0, other=num_targets)
        if (target < num_targets) & (target != before) & (tl.load(targets_ptr + stop) == target):
            slot = 2 * chunk + (tl.load(targets_ptr + start) != target).to(tl.int64)
            total = tl.load(partials_ptr + slot * DIM + columns, mask=column_mask, other=0.0)
            first = chunk + 1
            more = True
            while more:
                chunks = first + tl.arange(0, BLOCK_C)
                begins = (
                    tl.load(targets_ptr + chunks * PIECE, mask=chunks < num_chunks, other=num_targets)
                    == target
                )
                rows = tl.load(
                    partials_ptr + (2 * chunks)[:, None] * DIM + columns[None, :],
                    mask=begins[:, None] & column_mask[None, :],
                    other=0.0,
                )
                total += tl.sum(rows, 0)
                more = tl.min(begins.to(tl.int32), 0) == 1
                first += BLOCK_C
            out = out_ptr + target.to(tl.int64) * DIM + columns
            tl.store(out, as_stored(total * SCALE, out_ptr.dtype.element_ty), mask=column_mask)


def sum_by_row(
    rows: Tensor, num_rows: int, grad: Tensor, level_stride: int, dim: int, scale: float, sparse: bool
) -> tuple[Tensor, Tensor]:
    """``scale`` times the sum of the gradients of each row: ``([num_rows, dim], none)``, or sparse ``([U, dim], [U])``.

    Args:
        rows: ``[T, L]``, the rows that the tokens read; ``num_rows`` is none.
        grad: ``[T, W]`` with contiguous rows; that of ``rows[t, l]`` is ``grad[t, l * level_stride:][:dim]``.
        sparse: give the rows that were read, ascending, and their sums only. The host waits for their number.
    """
    targets, order = rows.flatten().sort(stable=True)
    is_first = torch.ones_like(targets, dtype=torch.bool)
    torch.ne(targets[1:], targets[:-1], out=is_first[1:])
    num_targets, read_rows = num_rows, targets.new_empty(0, dtype=torch.int64)
    if sparse:
        ranks = is_first.cumsum(0) - 1
        num_targets = int(ranks[-1] + (targets[-1] < num_rows)) if len(targets) else 0
        read_rows = targets[is_first.nonzero_static(size=num_targets).squeeze(1)].to(torch.int64)
        targets = ranks  # what reads no row comes last
        out = grad.new_empty(num_targets, dim)
    else:
        out = grad.new_zeros(num_targets, dim)
    is_first[::_PIECE] = True
    _sum_sorted(out, grad, level_stride, rows.shape[1], scale, targets, order, is_first)
    return out, read_rows


def _sum_sorted(
    out: Tensor,
    grad: Tensor,
    level_stride: int,
    per_token: int,
    scale: float,
    targets: Tensor,
    order: Tensor,
    begins_piece: Tensor,
) -> None:
    """Rows of ``out`` that are among the sorted ``targets`` become the sums of their entries' gradients."""
    num_entries, (num_targets, dim) = len(targets), out.shape
    if num_entries == 0 or num_targets == 0:
        return
    num_chunks = triton.cdiv(num_entries, _PIECE)
    num_pieces = min(num_entries, num_targets + 1 + num_chunks)  # or fewer: the last ones are then empty
    starts = begins_piece.nonzero_static(size=num_pieces + 1, fill_value=num_entries).squeeze(1)
    sum_dtype = torch.promote_types(grad.dtype, torch.float32)
    partials = grad.new_empty(2 * num_chunks, dim, dtype=sum_dtype)
    block_d = min(triton.next_power_of_2(dim), 1024 // grad.itemsize)
    block_p = min(max(1, tile_elements(4096 // grad.itemsize) // block_d), triton.next_power_of_2(num_pieces))
    columns = triton.cdiv(dim, block_d)
    options = {
        "DIM": dim,
        "PIECE": _PIECE,
        "SCALE": scale,
        "BLOCK_D": block_d,
        "num_warps": 4,
        **OPTIONS,
    }
    with on_device_of(grad):
        _sum_pieces_kernel[(triton.cdiv(num_pieces, block_p), columns)](
            grad,
            order,
            targets,
            starts,
            out,
            partials,
            num_entries,
            num_targets,
            num_pieces,
            GRAD_STRIDE=grad.stride(0),
            LEVEL_STRIDE=level_stride,
            PER_TOKEN=per_token,
            SUM_DTYPE=tl.float64 if sum_dtype == torch.float64 else tl.float32,
            BLOCK_P=block_p,
            **options,
        )
        _join_pieces_kernel[(num_chunks, columns)](
            targets, out, partials, num_entries, num_targets, num_chunks, BLOCK_C=32, **options
        )

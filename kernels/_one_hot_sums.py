"""Sums of gradients by codeword, as products with one-hot matrices on tensor cores. The same bits in every run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, OPTIONS, as_stored, on_device_of, tile_elements

# Programs that keep a large GPU busy: about two for each multiprocessor.
_PROGRAMS = 264


@triton.jit
def _add_product(total, hot, values):
    """total [BK, BD] + hot [BK, BT] @ values [BT, BD]: sums in fp32 of values that are not rounded."""
    if INTERPRETED:
        total += tl.dot(hot.to(tl.float32), values.to(tl.float32), input_precision="ieee")
    elif values.dtype == tl.float32:  # 24 bits of a number are those of three bf16; ones and zeros are exact
        ones = hot.to(tl.bfloat16)
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(ones, low, total)
        total = tl.dot(ones, middle, total)
        total = tl.dot(ones, high, total)
    else:
        total = tl.dot(hot.to(values.dtype), values, total)
    return total


@triton.jit
def _one_hot_sums_kernel(
    grad_ptr, rows_ptr, partials_ptr, num_tokens, tokens_per_split,
    SIZES: tl.constexpr, NUM_ROWS: tl.constexpr, GRAD_STRIDE: tl.constexpr, LEVEL_STRIDE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partials[s, k] = sum of grad[t, l] over the tokens t of split s and the levels l where rows[t, l] = k.

    A program sums for BLOCK_K rows [BK] and BLOCK_D columns [BD] over one split.
    """
    first_row = tl.program_id(0) * BLOCK_K
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    rows = first_row + tl.arange(0, BLOCK_K)
    column_mask = columns < DIM

    first_level, last_level, level_end = len(SIZES), 0, 0  # whose rows the program sums for
    for level in tl.static_range(len(SIZES)):
        has_rows = (first_row < level_end + SIZES[level]) & (first_row + BLOCK_K > level_end)
        level_end += SIZES[level]
        first_level = tl.where(has_rows, tl.minimum(first_level, level), first_level)
        last_level = tl.where(has_rows, level, last_level)

    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for level in range(first_level, last_level + 1):
        for start in range(begin, end, BLOCK_T):
            tokens = start + tl.arange(0, BLOCK_T)
            read = tl.load(rows_ptr + tokens * len(SIZES) + level, mask=tokens < end, other=NUM_ROWS)
            values = tl.load(
                grad_ptr + tokens[:, None] * GRAD_STRIDE + (level * LEVEL_STRIDE + columns)[None, :],
                mask=(read < NUM_ROWS)[:, None] & column_mask[None, :],
                other=0.0,
            )
            total = _add_product(total, rows[:, None] == read[None, :], values)
    out = partials_ptr + (split * NUM_ROWS + rows)[:, None] * DIM + columns[None, :]
    tl.store(out, total, mask=(rows < NUM_ROWS)[:, None] & column_mask[None, :])


@triton.jit
def _add_splits_kernel(
    partials_ptr, out_ptr, num_elements, num_splits, SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """out = SCALE * (partials[0] + partials[1] + ...), in this order."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    partials = partials_ptr + elements
    for _ in range(num_splits):
        total += tl.load(partials, mask=mask, other=0.0)
        partials += num_elements
    tl.store(out_ptr + elements, as_stored(total * SCALE, out_ptr.dtype.element_ty), mask=mask)


def one_hot_sums(
    rows: Tensor, sizes: list[int], grad: Tensor, level_stride: int, dim: int, scale: float
) -> Tensor:
    """``scale`` times the sum of the gradients of each row, ``[sum(sizes), dim]``; not for fp64.

    Args:
        rows: int32 ``[T, L]``, rows of the packed codebooks; ``sum(sizes)`` is none.
        grad: ``[T, W]`` with contiguous rows; that of ``rows[t, l]`` is ``grad[t, l * level_stride:][:dim]``.
    """
    num_tokens, num_rows = len(rows), sum(sizes)
    block_k = max(16, min(triton.next_power_of_2(num_rows), 64))
    block_d = max(16, min(triton.next_power_of_2(dim), 64))
    block_t = max(16, min(triton.next_power_of_2(num_tokens), tile_elements(32 * block_d) // block_d))
    tiles = (triton.cdiv(num_rows, block_k), triton.cdiv(dim, block_d))
    num_splits = max(1, min(_PROGRAMS // (tiles[0] * tiles[1]), triton.cdiv(num_tokens, 4 * block_t)))
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, num_splits), block_t) * block_t
    partials = grad.new_empty(num_splits, num_rows, dim, dtype=torch.float32)
    out = grad.new_empty(num_rows, dim)
    with on_device_of(grad):
        _one_hot_sums_kernel[(*tiles, num_splits)](
            grad,
            rows,
            partials,
            num_tokens,
            tokens_per_split,
            SIZES=tuple(sizes),
            NUM_ROWS=num_rows,
            GRAD_STRIDE=grad.stride(0),
            LEVEL_STRIDE=level_stride,
            DIM=dim,
            BLOCK_K=block_k,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
            num_stages=2,
            **OPTIONS,
        )
        block = tile_elements(1024)
        _add_splits_kernel[(triton.cdiv(out.numel(), block),)](
            partials, out, out.numel(), num_splits, SCALE=scale, BLOCK=block, num_warps=4, **OPTIONS
        )
    return out

"""Sums of the code-guided contrastive loss and their gradients, over tiles of the B x B matrix. README.md derives them.

Rows x_i and columns y_j are the embeddings of the two kinds, packed; the roles are swapped for the gradients of the
other kind. z_ij = <x_i, y_j> a_i b_j, where a and b make up for the lengths of packed rows and for the temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, OPTIONS, as_stored, on_device_of

# Below this temperature exp(+-1 / temperature), and sums of it, leave the range of fp32: running maxima take over.
COLD = tl.constexpr(0.023)
LOWEST = tl.constexpr(-1e38)  # below every logit, and still a number
MIN_NORM = tl.constexpr(1e-12)
PAIRS_AT_ONCE = tl.constexpr(16)

_STRIPES = 16  # parts, of rows and of columns, that are summed apart
_CHUNK_ROWS = 512  # of logits that are written out, where a matrix-product library computes them


@triton.jit
def _pack_kernel(
    x_ptr, packed_ptr, inverse_ptr, factor_ptr, temperature_ptr, num_rows, dim, row_stride, column_stride,
    IS_LOGITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of length r = temperature^-1/2, so that products are logits; or (exact in 16 bits) times a power of two.

    Padded with zeros to WIDTH. inverse = r / |packed row|, factor = r / |x|; both are 0 for a row that counts as zero,
    or is padding.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    from_ptr = x_ptr + rows.to(tl.int64)[:, None] * row_stride
    largest = tl.zeros([BLOCK], tl.float64)
    for first in range(0, dim, BLOCK_D):
        mask = (rows < num_rows)[:, None] & (first + columns < dim)[None, :]
        x = tl.load(from_ptr + (first + columns)[None, :] * column_stride, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float64)), axis=1))
    exponent = largest.to(tl.int64, bitcast=True) >> 52
    scale = ((2046 - tl.minimum(exponent, 2045)) << 52).to(tl.float64, bitcast=True)
    square = tl.zeros([BLOCK], tl.float64)
    for first in range(0, dim, BLOCK_D):
        mask = (rows < num_rows)[:, None] & (first + columns < dim)[None, :]
        x = tl.load(from_ptr + (first + columns)[None, :] * column_stride, mask=mask, other=0.0)
        x = x.to(tl.float64) * scale[:, None]
        square += tl.sum(x * x, axis=1)
    length = tl.sqrt(square)
    is_zero = length / scale < MIN_NORM
    inverse = tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, length))
    inverse *= tl.sqrt(1 / tl.load(temperature_ptr))
    tl.store(factor_ptr + rows, (inverse * scale).to(factor_ptr.dtype.element_ty))
    if IS_LOGITS:
        scale *= inverse
        inverse = tl.where(is_zero, 0.0, 1.0)
    tl.store(inverse_ptr + rows, inverse.to(inverse_ptr.dtype.element_ty))
    for first in range(0, WIDTH, BLOCK_D):
        mask = (rows < num_rows)[:, None] & (first + columns < dim)[None, :]
        x = tl.load(from_ptr + (first + columns)[None, :] * column_stride, mask=mask, other=0.0)
        to_ptr = packed_ptr + rows.to(tl.int64)[:, None] * WIDTH + (first + columns)[None, :]
        x = (x.to(tl.float64) * scale[:, None]).to(packed_ptr.dtype.element_ty)
        tl.store(to_ptr, x, mask=(first + columns < WIDTH)[None, :])


@triton.jit
def _load_rows(x_ptr, row, BLOCK: tl.constexpr, first, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    # One address, and offsets that are known: addresses of their own would fill the registers.
    offsets = tl.arange(0, BLOCK)[:, None] * WIDTH + (first + tl.arange(0, BLOCK_D))[None, :]
    return tl.load(x_ptr + tl.cast(row, tl.int64) * WIDTH + offsets)


@triton.jit
def _product(
    x_ptr, y_ptr, row, column, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j>  [BM, BN]"""
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    product = tl.zeros([BM, BN], compute)
    for first in range(0, WIDTH, BLOCK_D):
        x = _load_rows(x_ptr, row, BM, first, WIDTH, BLOCK_D)
        y = _load_rows(y_ptr, column, BN, first, WIDTH, BLOCK_D)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION, out_dtype=compute)
    return product


@triton.jit
def _is_positive(
    row, column, item_ptr, code_ptr, min_shared_codes, padded,
    HAS_ITEMS: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Positives by position, by item and by codes  [BM, BN]"""
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    positive = (rows + (row - column))[:, None] == columns[None, :]
    if HAS_ITEMS:
        positive |= tl.load(item_ptr + row + rows)[:, None] == tl.load(item_ptr + column + columns)[None, :]
    if LEVELS > 0:
        shared = tl.zeros([BM, BN], tl.int32)
        for level in tl.static_range(LEVELS):
            of_level = code_ptr + level * tl.cast(padded, tl.int64)
            equal = tl.load(of_level + row + rows)[:, None] == tl.load(of_level + column + columns)[None, :]
            shared += equal.to(tl.int32)
        positive |= shared >= min_shared_codes
    return positive


@triton.jit
def _pair_weights(
    tile,
    pair_start_ptr,
    pair_place_ptr,
    pair_weight_ptr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of the given pairs [BM, BN]: a product of one-hot matrices, PAIRS_AT_ONCE pairs at a time."""
    weights = tl.zeros([BM, BN], pair_weight_ptr.dtype.element_ty)
    end = tl.load(pair_start_ptr + tile + 1)
    for first in range(tl.load(pair_start_ptr + tile), end, PAIRS_AT_ONCE):
        pairs = first + tl.arange(0, PAIRS_AT_ONCE)
        place = tl.load(pair_place_ptr + pairs, mask=pairs < end, other=0)
        weight = tl.load(pair_weight_ptr + pairs, mask=pairs < end, other=0.0)
        in_row = tl.arange(0, BM)[:, None] == (place // BN)[None, :]
        in_column = (place % BN)[:, None] == tl.arange(0, BN)[None, :]
        by_column = tl.where(in_column, weight[:, None], 0.0)
        weights = tl.dot(
            in_row.to(weight.dtype), by_column, weights, input_precision=PRECISION, out_dtype=weight.dtype
        )
    return weights


@triton.jit
def _add_to_log_sum(largest, total, logits, AXIS: tl.constexpr):
    """Running sum of exponentials along AXIS, times exp(-largest)."""
    new = tl.maximum(largest, tl.max(logits, axis=AXIS))
    shifted = logits - (new[:, None] if AXIS == 1 else new[None, :])
    return new, total * tl.exp(largest - new) + tl.sum(tl.exp(shifted), axis=AXIS)


@triton.jit
def _alignment_loss_fwd_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr, logits_ptr, temperature_ptr,
    item_ptr, code_ptr, min_shared_codes, pair_start_ptr, pair_place_ptr, pair_weight_ptr,
    row_sum_ptr, row_largest_ptr, column_sum_ptr, column_largest_ptr,
    batch, padded, first_row, num_rows, begin_row, end_row, row_stripe, column_stripe,
    IS_COLD: tl.constexpr, GIVEN_LOGITS: tl.constexpr, HAS_ITEMS: tl.constexpr, LEVELS: tl.constexpr,
    HAS_PAIRS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P_i = sum_j w_ij e_ij, N_i = sum_j (1 - w_ij) e_ij, and the same over i, for a stripe of rows and one of columns.

    row_sum [2, column stripes, num_rows], column_sum [2, row stripes, batch]: P, then N; times exp(-largest) if cold.
    Rows are [begin_row, end_row) of the num_rows from first_row on; given logits are those of these rows alone.
    Nothing is done where IS_COLD is not what the temperature is: the host, which does not know it, launches both.
    """
    if (tl.load(temperature_ptr) < COLD) != IS_COLD:
        return
    compute: tl.constexpr = x_inverse_ptr.dtype.element_ty
    row_part, column_part = tl.program_id(0), tl.program_id(1)
    column_begin = column_part * column_stripe
    column_end = tl.minimum(column_begin + column_stripe, batch)
    row_begin = begin_row + row_part * row_stripe
    row_end = tl.minimum(row_begin + row_stripe, end_row)
    for begin in range(row_begin, row_end, BM):
        row = first_row + begin
        in_rows = tl.arange(0, BM) < row_end - begin
        row_inverse = tl.load(x_inverse_ptr + row + tl.arange(0, BM))
        row_p, row_n = tl.zeros([BM], compute), tl.zeros([BM], compute)
        row_top_p, row_top_n = row_p + LOWEST, row_n + LOWEST
        for column in range(column_begin, column_end, BN):
            columns = tl.arange(0, BN)
            in_batch = columns < batch - column
            valid = in_rows[:, None] & in_batch[None, :]
            if GIVEN_LOGITS:
                z = tl.load(
                    _place(logits_ptr, begin - begin_row, column, batch, BM, BN), mask=valid, other=0.0
                )
            else:
                z = _product(x_ptr, y_ptr, row, column, BM, BN, WIDTH, BLOCK_D, PRECISION)
            z = z * row_inverse[:, None] * tl.load(y_inverse_ptr + column + columns)[None, :]
            positive = _is_positive(
                row, column, item_ptr, code_ptr, min_shared_codes, padded, HAS_ITEMS, LEVELS, BM, BN
            )
            if HAS_PAIRS:
                tile = begin // BM * tl.cdiv(batch, BN) + column // BN
                weight = _pair_weights(
                    tile, pair_start_ptr, pair_place_ptr, pair_weight_ptr, BM, BN, PRECISION
                )
                weight = tl.where(positive, 1.0, weight)
            sum_p_ptr = column_sum_ptr + (row_part * batch + column) + columns
            sum_n_ptr = sum_p_ptr + tl.num_programs(0) * batch
            if IS_COLD:
                if HAS_PAIRS:
                    is_p, is_n = weight > 0, weight < 1
                    z_p = tl.where(valid & is_p, z + tl.log(tl.where(is_p, weight, 1.0)), float("-inf"))
                    z_n = tl.where(valid & is_n, z + tl.log(tl.where(is_n, 1 - weight, 1.0)), float("-inf"))
                else:
                    z_p = tl.where(valid & positive, z, float("-inf"))
                    z_n = tl.where(valid & ~positive, z, float("-inf"))
                row_top_p, row_p = _add_to_log_sum(row_top_p, row_p, z_p, 1)
                row_top_n, row_n = _add_to_log_sum(row_top_n, row_n, z_n, 1)
                top_p_ptr = column_largest_ptr + (row_part * batch + column) + columns
                top_n_ptr = top_p_ptr + tl.num_programs(0) * batch
                top_p, column_p = _add_to_log_sum(
                    tl.load(top_p_ptr, mask=in_batch, other=0.0),
                    tl.load(sum_p_ptr, mask=in_batch, other=0.0),
                    z_p,
                    0,
                )
                top_n, column_n = _add_to_log_sum(
                    tl.load(top_n_ptr, mask=in_batch, other=0.0),
                    tl.load(sum_n_ptr, mask=in_batch, other=0.0),
                    z_n,
                    0,
                )
                tl.store(top_p_ptr, top_p, mask=in_batch)
                tl.store(top_n_ptr, top_n, mask=in_batch)
            else:
                e = tl.where(valid, tl.exp(z), 0.0)
                if HAS_PAIRS:
                    e_p, e_n = weight * e, (1 - weight) * e
                else:
                    e_p, e_n = tl.where(positive, e, 0.0), tl.where(positive, 0.0, e)
                row_p += tl.sum(e_p, axis=1)
                row_n += tl.sum(e_n, axis=1)
                column_p = tl.load(sum_p_ptr, mask=in_batch, other=0.0) + tl.sum(e_p, axis=0)
                column_n = tl.load(sum_n_ptr, mask=in_batch, other=0.0) + tl.sum(e_n, axis=0)
            tl.store(sum_p_ptr, column_p, mask=in_batch)
            tl.store(sum_n_ptr, column_n, mask=in_batch)
        to_p = (column_part * num_rows + begin) + tl.arange(0, BM)
        to_n = to_p + tl.num_programs(1) * num_rows
        tl.store(row_sum_ptr + to_p, row_p, mask=in_rows)
        tl.store(row_sum_ptr + to_n, row_n, mask=in_rows)
        if IS_COLD:
            tl.store(row_largest_ptr + to_p, row_top_p, mask=in_rows)
            tl.store(row_largest_ptr + to_n, row_top_n, mask=in_rows)
        tl.debug_barrier()  # the next rows add to the same columns, in other threads perhaps


@triton.jit
def _place(logits_ptr, row, column, batch, BM: tl.constexpr, BN: tl.constexpr):
    rows, columns = tl.arange(0, BM).to(tl.int64), tl.arange(0, BN)
    return logits_ptr + (tl.cast(row, tl.int64) * batch + column) + (rows[:, None] * batch + columns[None, :])


@triton.jit
def _gradients_of_logits(
    z, row, column, begin, item_ptr, code_ptr, min_shared_codes, pair_start_ptr, pair_place_ptr, pair_weight_ptr,
    x_terms_ptr, y_terms_ptr, batch, padded,
    HAS_ITEMS: tl.constexpr, LEVELS: tl.constexpr, HAS_PAIRS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d loss / d z_ij in the unit of :func:`_terms`  [BM, BN]"""
    positive = _is_positive(
        row, column, item_ptr, code_ptr, min_shared_codes, padded, HAS_ITEMS, LEVELS, BM, BN
    )
    weight = z
    if HAS_PAIRS:
        tile = begin // BM * tl.cdiv(batch, BN) + column // BN
        weight = _pair_weights(tile, pair_start_ptr, pair_place_ptr, pair_weight_ptr, BM, BN, PRECISION)
        weight = tl.where(positive, 1.0, weight)
    by_row = _by_one_side(z, positive, weight, x_terms_ptr + row + tl.arange(0, BM), padded, 1, HAS_PAIRS)
    return by_row + _by_one_side(
        z, positive, weight, y_terms_ptr + column + tl.arange(0, BN), padded, 0, HAS_PAIRS
    )


@triton.jit
def _by_one_side(z, positive, weight, terms_ptr, padded, AXIS: tl.constexpr, HAS_PAIRS: tl.constexpr):
    log_p = tl.expand_dims(tl.load(terms_ptr), AXIS)
    log_n = tl.expand_dims(tl.load(terms_ptr + padded), AXIS)
    grad_p = tl.expand_dims(tl.load(terms_ptr + 2 * padded), AXIS)
    grad_n = tl.expand_dims(tl.load(terms_ptr + 3 * padded), AXIS)
    if HAS_PAIRS:
        has_weight = weight > 0
        part = tl.exp(z - tl.where(has_weight, log_p, log_n))  # e / P, or e / N
        rest = tl.expand_dims(tl.load(terms_ptr + 4 * padded), AXIS)  # grad_n P / N
        return part * tl.where(has_weight, weight * grad_p + (1 - weight) * rest, grad_n)
    return tl.exp(z - tl.where(positive, log_p, log_n)) * tl.where(positive, grad_p, grad_n)


@triton.jit
def _alignment_loss_bwd_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr, factor_ptr, temperature_ptr,
    item_ptr, code_ptr, min_shared_codes, pair_start_ptr, pair_place_ptr, pair_weight_ptr,
    x_terms_ptr, y_terms_ptr, unit_ptr, grad_ptr, along_ptr,
    batch, padded, first_row, num_rows, dim,
    HAS_ITEMS: tl.constexpr, LEVELS: tl.constexpr, HAS_PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad of x_i = (G_i - x_i temperature <x_i, G_i>) factor_i, G_i = sum_j (d loss / d z_ij) y_j, of packed rows.

    along_i = <x_i, G_i> = sum_j z_ij (d loss / d z_ij), in the unit of :func:`_terms`. A program owns BM rows and walks
    all columns.
    """
    begin = tl.program_id(0) * BM
    row = first_row + begin
    row_inverse = tl.load(x_inverse_ptr + row + tl.arange(0, BM))
    compute: tl.constexpr = x_inverse_ptr.dtype.element_ty
    sums = tl.zeros([BM, WIDTH], compute)
    for column in range(0, batch, BN):
        column_inverse = tl.load(y_inverse_ptr + column + tl.arange(0, BN))
        z = _product(x_ptr, y_ptr, row, column, BM, BN, WIDTH, BLOCK_D, PRECISION)
        z = z * row_inverse[:, None] * column_inverse[None, :]
        grad = _gradients_of_logits(
            z, row, column, begin, item_ptr, code_ptr, min_shared_codes, pair_start_ptr, pair_place_ptr,
            pair_weight_ptr, x_terms_ptr, y_terms_ptr, batch, padded, HAS_ITEMS, LEVELS, HAS_PAIRS, BM, BN, PRECISION,
        )  # fmt: skip
        in_batch = tl.arange(0, BN) < batch - column
        grad = tl.where(in_batch[None, :], grad * column_inverse[None, :], 0.0)
        y = _load_rows(y_ptr, column, BN, 0, WIDTH, WIDTH)
        sums = tl.dot(grad.to(y.dtype), y, sums, input_precision=PRECISION, out_dtype=compute)
    x = _load_rows(x_ptr, row, BM, 0, WIDTH, WIDTH).to(compute) * row_inverse[:, None]
    along = tl.sum(x.to(tl.float64) * sums, axis=1)
    rest = sums - x * (along * tl.load(temperature_ptr)).to(compute)[:, None]
    grad = rest * (tl.load(factor_ptr + row + tl.arange(0, BM)) * tl.load(unit_ptr))[:, None]
    offsets = begin + tl.arange(0, BM)
    in_rows = offsets < num_rows
    tl.store(along_ptr + offsets, along, mask=in_rows)
    dims = tl.arange(0, WIDTH)
    to_ptr = grad_ptr + offsets.to(tl.int64)[:, None] * dim + dims[None, :]
    tl.store(
        to_ptr, as_stored(grad, grad_ptr.dtype.element_ty), mask=in_rows[:, None] & (dims < dim)[None, :]
    )


@triton.jit
def _grad_logits_kernel(
    logits_ptr, grad_ptr, x_inverse_ptr, y_inverse_ptr,
    item_ptr, code_ptr, min_shared_codes, pair_start_ptr, pair_place_ptr, pair_weight_ptr,
    x_terms_ptr, y_terms_ptr, batch, padded, first_row, begin_row, end_row,
    HAS_ITEMS: tl.constexpr, LEVELS: tl.constexpr, HAS_PAIRS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(d loss / d z_ij) b_j  [end_row - begin_row, batch], from the products <x_i, y_j> of these rows."""
    begin, column = begin_row + tl.program_id(0) * BM, tl.program_id(1) * BN
    row = first_row + begin
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    valid = (rows < end_row - begin)[:, None] & (columns < batch - column)[None, :]
    column_inverse = tl.load(y_inverse_ptr + column + columns)
    row_inverse = tl.load(x_inverse_ptr + row + rows)
    z = tl.load(_place(logits_ptr, begin - begin_row, column, batch, BM, BN), mask=valid, other=0.0)
    z = z * row_inverse[:, None] * column_inverse[None, :]
    grad = _gradients_of_logits(
        z, row, column, begin, item_ptr, code_ptr, min_shared_codes, pair_start_ptr, pair_place_ptr,
        pair_weight_ptr, x_terms_ptr, y_terms_ptr, batch, padded, HAS_ITEMS, LEVELS, HAS_PAIRS, BM, BN, PRECISION,
    )  # fmt: skip
    grad = (grad * column_inverse[None, :]).to(grad_ptr.dtype.element_ty)
    tl.store(_place(grad_ptr, begin - begin_row, column, batch, BM, BN), grad, mask=valid)


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of logits, how much of D a product takes at once, and what a program gets."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Packed:
    rows: Tensor  # [padded, WIDTH]
    inverse: Tensor  # [padded]
    factor: Tensor  # [padded]

    @property
    def width(self) -> int:
        return self.rows.shape[1]


class _Batch:
    """A batch as the kernels take it."""

    def __init__(
        self,
        hash_emb: Tensor,
        semantic_emb: Tensor,
        temperature: Tensor,
        item_ids: Tensor | None,
        codes: Tensor | None,
        min_shared_codes: int,
        pair_index: Tensor | None,
        pair_weight: Tensor | None,
        first_row: int,
        num_rows: int,
    ) -> None:
        self.size, self.dim = hash_emb.shape
        self.first_row, self.num_rows = first_row, num_rows
        self.dtype = torch.float64 if hash_emb.dtype == torch.float64 else torch.float32
        self.is_fused = _is_fused(self.dim, hash_emb.dtype)
        self.tile = _tile(self.dim, hash_emb.dtype)
        # A number is written on the device, not copied there, and one that is there already stays: nothing waits.
        if temperature.is_cpu:
            self.temperature = hash_emb.new_full((1,), temperature.item(), dtype=torch.float64)
        else:
            self.temperature = temperature.reshape(1).to(torch.float64)
        self.may_be_cold = _may_be_cold(temperature)
        self.hash, self.semantic = self._pack(hash_emb), self._pack(semantic_emb)
        has_pairs = pair_index is not None and pair_index.shape[1] > 0
        start, place, weight = (
            self._pairs_by_tile(pair_index, pair_weight) if has_pairs else (None, None, None)
        )
        self.positives = {
            "item_ptr": None if item_ids is None else self.pad(item_ids),
            "code_ptr": None if codes is None else self.pad(codes.T),
            "min_shared_codes": min_shared_codes,
            "pair_start_ptr": start,
            "pair_place_ptr": place,
            "pair_weight_ptr": weight,
            "HAS_ITEMS": item_ids is not None,
            "LEVELS": 0 if codes is None else codes.shape[1],
            "HAS_PAIRS": has_pairs,
        }

    @property
    def padded(self) -> int:
        """Tiles start at any row: what lies behind the batch is read, and counts for nothing."""
        return triton.cdiv(self.size, 128) * 128 + 128

    def pad(self, values: Tensor) -> Tensor:
        """[..., B] -> [..., padded], contiguous"""
        return torch.nn.functional.pad(values, (0, self.padded - self.size))

    @property
    def options(self) -> dict:
        """Of every kernel that walks tiles."""
        return {
            "BM": self.tile.rows,
            "BN": self.tile.columns,
            "PRECISION": _precision(),
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            **OPTIONS,
        }

    def _pack(self, x: Tensor) -> _Packed:
        # The interpreter computes bf16 on raw bits: there 16-bit operands are widened.
        operand = self.dtype if INTERPRETED.value else x.dtype
        width = max(16, triton.next_power_of_2(self.dim)) if self.is_fused else triton.cdiv(self.dim, 16) * 16
        rows = x.new_empty(self.padded, width, dtype=operand)
        inverse, factor = x.new_empty(2, self.padded, dtype=self.dtype)
        block = 128 if INTERPRETED.value else 16
        _pack_kernel[(self.padded // block,)](
            x, rows, inverse, factor, self.temperature, self.size, self.dim, *x.stride(),
            IS_LOGITS=x.dtype.itemsize > 2, WIDTH=width, BLOCK=block, BLOCK_D=min(128, triton.next_power_of_2(width)),
            num_warps=4, **OPTIONS,
        )  # fmt: skip
        return _Packed(rows, inverse, factor)

    def _pairs_by_tile(self, pair_index: Tensor, pair_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the pairs of each tile start, their places in it, and their weights; each pair in both orders.

        Of equal pairs the largest weight counts, the others get 0. A pair or a weight that is out of range, which is
        not looked for on a GPU, becomes NaN, and so do the sums of its tile.
        """
        tile, last = self.tile, self.size - 1
        weight = pair_weight.to(self.dtype)
        is_bad = ((pair_index < 0) | (pair_index > last)).any(0) | ~((weight > 0) & (weight <= 1))
        weight = weight.masked_fill(is_bad, torch.nan).repeat(2)
        index = pair_index.to(torch.int64).clamp(0, last)
        row, column = torch.cat([index, index.flip(0)], dim=1)
        row = row - self.first_row
        num_tiles = triton.cdiv(self.num_rows, tile.rows) * triton.cdiv(self.size, tile.columns)
        of_tile = row // tile.rows * triton.cdiv(self.size, tile.columns) + column // tile.columns
        of_tile = torch.where((row >= 0) & (row < self.num_rows), of_tile, num_tiles)
        area = tile.rows * tile.columns
        key = of_tile * area + row % tile.rows * tile.columns + column % tile.columns
        order = weight.argsort()
        order = order[key[order].argsort(stable=True)]
        key, weight = key[order], weight[order]
        is_last = torch.ones_like(key, dtype=torch.bool)
        is_last[:-1] = key[1:] != key[:-1]
        starts = torch.arange(num_tiles + 1, device=key.device) * area
        return (
            torch.searchsorted(key, starts).to(torch.int32),
            (key % area).to(torch.int32),
            torch.where(is_last, weight, 0),
        )


def alignment_loss(
    hash_emb: Tensor,
    semantic_emb: Tensor,
    temperature: Tensor,
    item_ids: Tensor | None,
    codes: Tensor | None,
    min_shared_codes: int,
    pair_index: Tensor | None,
    pair_weight: Tensor | None,
    first_row: int,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    """Returns the logarithms of the sums, in fp64: row_sums ``[2, num_rows]`` and column_sums ``[2, B]``."""
    with on_device_of(hash_emb):
        batch = _Batch(
            hash_emb, semantic_emb, temperature, item_ids, codes, min_shared_codes, pair_index, pair_weight,
            first_row, num_rows,
        )  # fmt: skip
        tile = batch.tile
        chunk = num_rows if batch.is_fused else _CHUNK_ROWS
        row_stripe = _stripe(min(chunk, num_rows), tile.rows)
        column_stripe = _stripe(batch.size, tile.columns)
        grid = max(1, triton.cdiv(min(chunk, num_rows), row_stripe)), triton.cdiv(batch.size, column_stripe)
        row_sum, row_largest = hash_emb.new_zeros(2, 2, grid[1], num_rows, dtype=batch.dtype)
        column_sum, column_largest = hash_emb.new_zeros(2, 2, grid[0], batch.size, dtype=batch.dtype)
        column_largest.fill_(LOWEST.value)
        for begin in range(0, num_rows, max(chunk, 1)):
            end = min(begin + chunk, num_rows)
            logits = None if batch.is_fused else _logits(batch.hash, batch.semantic, batch, begin, end)
            for is_cold in batch.may_be_cold:
                _alignment_loss_fwd_kernel[grid](
                    batch.hash.rows, batch.semantic.rows, batch.hash.inverse, batch.semantic.inverse, logits,
                    batch.temperature,
                    row_sum_ptr=row_sum, row_largest_ptr=row_largest,
                    column_sum_ptr=column_sum, column_largest_ptr=column_largest,
                    batch=batch.size, padded=batch.padded, first_row=first_row, num_rows=num_rows,
                    begin_row=begin, end_row=end,
                    row_stripe=row_stripe, column_stripe=column_stripe,
                    IS_COLD=is_cold, GIVEN_LOGITS=not batch.is_fused, WIDTH=batch.hash.width, BLOCK_D=tile.depth,
                    **batch.positives, **batch.options,
                )  # fmt: skip
        return tuple(
            _log_sums(sums, largest, batch.temperature)
            for sums, largest in ((row_sum, row_largest), (column_sum, column_largest))
        )


def _log_sums(sums: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """[2, stripes, n] -> [2, n]"""
    largest = torch.where(temperature < COLD.value, largest, 0).double()
    highest = largest.amax(1, keepdim=True)
    return (sums * (largest - highest).exp()).sum(1).log() + highest.squeeze(1)


def alignment_loss_backward(
    grad_row_sums: Tensor,
    grad_column_sums: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    hash_emb: Tensor,
    semantic_emb: Tensor,
    temperature: Tensor,
    item_ids: Tensor | None,
    codes: Tensor | None,
    min_shared_codes: int,
    pair_index: Tensor | None,
    pair_weight: Tensor | None,
    first_row: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of these rows of both embeddings ``[num_rows, D]``, and their part of the temperature's."""
    with on_device_of(hash_emb):
        batch = _Batch(
            hash_emb, semantic_emb, temperature, item_ids, codes, min_shared_codes, pair_index, pair_weight,
            first_row, num_rows,
        )  # fmt: skip
        (of_rows, of_columns), unit = _terms(
            torch.stack([row_sums, column_sums]), torch.stack([grad_row_sums, grad_column_sums]), batch
        )
        gradient = _fused_gradient if batch.is_fused else _library_gradient
        grad_hash, along_rows = gradient(
            batch, batch.hash, batch.semantic, of_rows, of_columns, unit, hash_emb.dtype
        )
        grad_semantic, along_columns = gradient(
            batch, batch.semantic, batch.hash, of_columns, of_rows, unit, hash_emb.dtype
        )
        # Over all rows and over all columns the sums of z (d loss / d z) are one number, rounded twice.
        along = torch.stack([along_rows, along_columns]).sum() / 2
        grad_temperature = -along * (unit / batch.temperature).squeeze(0)
        return grad_hash, grad_semantic, grad_temperature.to(temperature)


def _terms(log_sums: Tensor, grads: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
    """log P, log N, their gradients and that of N times P / N ``[2, 5, padded]``, and the unit of the gradients.

    What rounding leaves of the logarithms goes into the gradients, as a factor. In their unit, gradients of logits are
    at most 2^15, so that those of a large batch are no subnormal numbers in fp16.
    """
    is_empty = log_sums == -torch.inf  # all are positives: nothing is divided by N
    log_sums = log_sums.masked_fill(is_empty, 0)
    rounded = log_sums.to(batch.dtype)
    unit = torch.ldexp(
        torch.ones_like(grads[0, 0, 0]), grads.abs().amax().frexp().exponent - 14
    )  # exact in any dtype
    grads = grads / unit * (rounded - log_sums).exp()
    rest = grads[:, 1] * (rounded[:, 0].double() - rounded[:, 1]).exp()
    rest = rest.masked_fill(is_empty[:, 1], 0)
    terms = torch.cat([rounded, grads.to(batch.dtype), rest.to(batch.dtype).unsqueeze(1)], dim=1)
    return batch.pad(terms), unit.reshape(1).to(batch.dtype)


def _fused_gradient(
    batch: _Batch, x: _Packed, y: _Packed, x_terms: Tensor, y_terms: Tensor, unit: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad = x.rows.new_empty(batch.num_rows, batch.dim, dtype=dtype)
    along = x.inverse.new_empty(batch.num_rows, dtype=torch.float64)
    if batch.num_rows > 0:
        _alignment_loss_bwd_kernel[(triton.cdiv(batch.num_rows, batch.tile.rows),)](
            x.rows, y.rows, x.inverse, y.inverse, x.factor, batch.temperature,
            x_terms_ptr=x_terms, y_terms_ptr=y_terms, unit_ptr=unit, grad_ptr=grad, along_ptr=along,
            batch=batch.size, padded=batch.padded, first_row=batch.first_row, num_rows=batch.num_rows, dim=batch.dim,
            WIDTH=x.width, BLOCK_D=batch.tile.depth, **batch.positives, **batch.options,
        )  # fmt: skip
    return grad, along


def _library_gradient(
    batch: _Batch, x: _Packed, y: _Packed, x_terms: Tensor, y_terms: Tensor, unit: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the fused kernel does, with both products by the library and the logits of some rows written out."""
    grad = x.rows.new_empty(batch.num_rows, batch.dim, dtype=dtype)
    along = x.inverse.new_empty(batch.num_rows, dtype=torch.float64)
    for begin in range(0, batch.num_rows, _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, batch.num_rows)
        logits = _logits(x, y, batch, begin, end)
        grad_logits = logits if logits.dtype == x.rows.dtype else torch.empty_like(logits, dtype=x.rows.dtype)
        grid = triton.cdiv(end - begin, batch.tile.rows), triton.cdiv(batch.size, batch.tile.columns)
        _grad_logits_kernel[grid](
            logits, grad_logits, x.inverse, y.inverse,
            x_terms_ptr=x_terms, y_terms_ptr=y_terms, batch=batch.size, padded=batch.padded,
            first_row=batch.first_row, begin_row=begin, end_row=end, **batch.positives, **batch.options,
        )  # fmt: skip
        rows = slice(batch.first_row + begin, batch.first_row + end)
        sums = _matrix_product(grad_logits, y.rows[: batch.size])
        x_rows = x.rows[rows].to(batch.dtype) * x.inverse[rows, None]
        along[begin:end] = (x_rows.double() * sums).sum(1)
        rest = sums - x_rows * (along[begin:end, None] * batch.temperature).to(batch.dtype)
        rest *= (x.factor[rows] * unit)[:, None]
        grad[begin:end] = rest[:, : batch.dim]
    return grad, along


def _logits(x: _Packed, y: _Packed, batch: _Batch, begin: int, end: int) -> Tensor:
    """<x_i, y_j>  [end - begin, B]"""
    return _matrix_product(x.rows[batch.first_row + begin : batch.first_row + end], y.rows[: batch.size].T)


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32 at least. How the library multiplies fp32 is for torch's own settings to say."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)


def _may_be_cold(temperature: Tensor) -> tuple[bool, ...]:
    """What the host knows of it."""
    return (temperature.item() < COLD.value,) if temperature.is_cpu else (False, True)


def _stripe(size: int, block: int) -> int:
    """How many rows of ``size`` each of the stripes has: whole blocks, so that there are at most _STRIPES."""
    return triton.cdiv(triton.cdiv(max(size, 1), block), _STRIPES) * block


def _is_fused(dim: int, dtype: torch.dtype) -> bool:
    """Beyond that a tile's operands and gradients no longer fit on a multiprocessor beside enough logits."""
    return dim <= 256 and triton.next_power_of_2(dim) * dtype.itemsize <= 1024


def _tile(dim: int, dtype: torch.dtype) -> _Tile:
    """The largest tiles that do not spill: a thread holds logits, gradients and what it knows of its columns."""
    width = max(16, triton.next_power_of_2(dim))
    if INTERPRETED.value:
        return _Tile(64, 64, 16, 4, 1)  # products in pieces, as matrix instructions add them up
    is_cuda = triton.runtime.driver.active.get_current_target().backend == "cuda"
    warps = 8 if is_cuda else 4
    if not _is_fused(dim, dtype):
        return _Tile(64, 32, 64, warps, 1)
    if dtype.itemsize == 2:
        return _Tile(64 if width <= 128 else 32, 32, min(width, 64), warps, 2)
    if dtype.itemsize == 4:
        return (
            _Tile(32, 32, min(width, 32), 4, 1)
            if width <= 64
            else _Tile(32, 16 if is_cuda else 32, 64, warps, 1)
        )
    return _Tile(32, 32, 32, warps, 1)


def _precision() -> str:
    """Of products of fp32: three of TF32 where there are such, which leave an error like that of fp32 itself."""
    if INTERPRETED.value or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


def representative_calls() -> dict[str, Callable[[], object]]:
    """For ``python -m h2rec.kernels.aot``."""

    def both(dtype: torch.dtype, dim: int, has_pairs: bool, temperature: Tensor) -> None:
        size, levels, num_pairs = 8192, 4, 10_000
        meta = partial(torch.empty, device="meta")
        embeddings = [meta(size, dim, dtype=dtype)] * 2
        positives = (
            meta(size, dtype=torch.int64),
            meta(size, levels, dtype=torch.int32),
            3,
            meta(2, num_pairs, dtype=torch.int64) if has_pairs else None,
            meta(num_pairs) if has_pairs else None,
            0,
            size,
        )
        sums = [meta(2, size, dtype=torch.float64)] * 4
        alignment_loss(*embeddings, temperature, *positives)
        alignment_loss_backward(*sums, *embeddings, temperature.to("meta"), *positives)

    known, unknown = torch.tensor(0.5), torch.empty((), device="meta")
    return {
        "fp32 D=64, any temperature": partial(both, torch.float32, 64, False, unknown),
        "bf16 D=64, pairs": partial(both, torch.bfloat16, 64, True, known),
        "fp16 D=256": partial(both, torch.float16, 256, False, known),
        "fp32 D=256": partial(both, torch.float32, 256, False, known),
        "fp64 D=64": partial(both, torch.float64, 64, False, known),
        "bf16 D=768": partial(both, torch.bfloat16, 768, False, known),
    }

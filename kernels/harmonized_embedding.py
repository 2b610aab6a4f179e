"""Item ids to semantic and hash embeddings, and their gradients. kernels/README.md has the costs."""

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._items import Items, fold_code, read_codes, read_items, table_rows
from ._launch import OPTIONS, as_stored, on_device_of, tile_elements
from ._one_hot_sums import one_hot_sums
from ._sum_by_row import sum_by_row


@triton.jit
def _sum_table_rows(
    table_ptr, items, ids, is_read, columns, column_mask,
    STRIDE: tl.constexpr, HASH_MODE: tl.constexpr, NUM_HASHES: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    """Some columns of the sum of the table's rows that each item reads, [BT, BD]."""
    total = tl.zeros([ids.shape[0], columns.shape[0]], SUM_DTYPE)
    prefix = tl.zeros_like(ids)
    mask = is_read[:, None] & column_mask[None, :]
    for j in tl.static_range(NUM_HASHES):
        if HASH_MODE == "prefix":
            prefix = fold_code(items, ids, prefix, j, is_read)
        rows = table_rows(items, ids, prefix, j, HASH_MODE)
        total += tl.load(table_ptr + rows[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0).to(
            SUM_DTYPE
        )
    return total


@triton.jit
def _store(out_ptr, values, tokens, columns, mask, is_item, is_read, STRIDE: tl.constexpr):
    """Zero for padding, NaN for an item that is out of range."""
    filler = tl.where(is_item, float("nan"), 0.0)
    values = tl.where(is_read[:, None], values, filler[:, None])
    values = as_stored(values, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * STRIDE + columns[None, :], values, mask=mask)


@triton.jit
def _harmonized_embedding_fwd_kernel(
    items, codebooks_ptr, table_ptr, first_ptr, hashed_ptr, num_tokens,
    SIZES: tl.constexpr, DIM: tl.constexpr, CODEBOOK_STRIDE: tl.constexpr,
    TABLE_DIM: tl.constexpr, TABLE_STRIDE: tl.constexpr, HASH_MODE: tl.constexpr, NUM_HASHES: tl.constexpr,
    POOLING: tl.constexpr, COMBINE: tl.constexpr, FIRST_DIM: tl.constexpr,
    SUM_DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """first[t] = pool_l codebook_l[codes[id_t, l]],  hashed[t] = sum_j table[row_j(id_t)],  or their combination.

    A program makes BLOCK_T tokens [BT] and BLOCK_D columns [BD] of every part of the output.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ids, is_item, is_read = read_items(items, tokens, num_tokens, SIZES)
    in_batch = (tokens < num_tokens)[:, None]

    ADDED: tl.constexpr = COMBINE == "sum" or COMBINE == "mean"
    BY_LEVEL: tl.constexpr = POOLING == "levels" or POOLING == "concat"
    TABLE_SCALE: tl.constexpr = 0.5 if COMBINE == "mean" else 1.0
    CODEBOOK_SCALE: tl.constexpr = TABLE_SCALE / len(SIZES) if POOLING == "mean" else TABLE_SCALE

    column_mask = columns < DIM
    out_mask = in_batch & column_mask[None, :]
    read_mask = is_read[:, None] & column_mask[None, :]
    semantic = tl.zeros([BLOCK_T, BLOCK_D], SUM_DTYPE)
    first_row = 0  # of the level's codebook
    for level in tl.static_range(len(SIZES)):
        rows = first_row + read_codes(items, ids, level, is_read)
        first_row += SIZES[level]
        codewords = codebooks_ptr + rows[:, None] * CODEBOOK_STRIDE + columns[None, :]
        semantic += tl.load(codewords, mask=read_mask, other=0.0).to(SUM_DTYPE)
        if BY_LEVEL or level == len(SIZES) - 1:
            out_columns = columns + level * DIM if BY_LEVEL else columns
            semantic *= CODEBOOK_SCALE
            if ADDED:
                semantic += TABLE_SCALE * _sum_table_rows(
                    table_ptr, items, ids, is_read, out_columns, column_mask, TABLE_STRIDE, HASH_MODE, NUM_HASHES,
                    SUM_DTYPE,
                )  # fmt: skip
            _store(first_ptr, semantic, tokens, out_columns, out_mask, is_item, is_read, FIRST_DIM)
            semantic = tl.zeros([BLOCK_T, BLOCK_D], SUM_DTYPE)

    if TABLE_DIM > 0 and not ADDED:
        column_mask = columns < TABLE_DIM
        hashed = _sum_table_rows(
            table_ptr,
            items,
            ids,
            is_read,
            columns,
            column_mask,
            TABLE_STRIDE,
            HASH_MODE,
            NUM_HASHES,
            SUM_DTYPE,
        )
        out_mask = in_batch & column_mask[None, :]
        if COMBINE == "concat":
            last_columns = columns + (FIRST_DIM - TABLE_DIM)
            _store(first_ptr, hashed, tokens, last_columns, out_mask, is_item, is_read, FIRST_DIM)
        else:
            _store(hashed_ptr, hashed, tokens, columns, out_mask, is_item, is_read, TABLE_DIM)


def harmonized_embedding(
    item_ids: Tensor,
    codes: Tensor | None,
    codebooks: Tensor | None,
    sizes: list[int],
    hash_table: Tensor | None,
    hash_mode: str,
    hash_constants: Tensor | None,
    divisor: int,
    num_items: int,
    pooling: str,
    padding_idx: int | None,
    combine: str | None,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``(semantic or combined, hashed)``; a half that is not asked for has no elements."""
    like = codebooks if codebooks is not None else hash_table
    shape, num_tokens = item_ids.shape, item_ids.numel()
    num_levels = len(sizes)
    dim = 0 if codebooks is None else codebooks.shape[1]
    table_dim = 0 if hash_table is None else hash_table.shape[1]
    semantic_shape = {"levels": (num_levels, dim), "concat": (num_levels * dim,)}.get(pooling, (dim,))
    if combine == "concat":
        semantic_shape = (semantic_shape[0] + table_dim,)
    first = like.new_empty((*shape, *semantic_shape) if dim else 0)
    hashed = like.new_empty((*shape, table_dim) if table_dim and combine is None else 0)
    if num_tokens == 0:
        return first, hashed

    items, num_hashes = _items(
        item_ids,
        codes,
        0 if hash_table is None else hash_table.shape[0],
        hash_mode,
        hash_constants,
        divisor,
        num_items,
        padding_idx,
    )
    codebooks, hash_table = _with_contiguous_rows(codebooks), _with_contiguous_rows(hash_table)
    block_t, block_d = _forward_tile(num_tokens, max(dim, table_dim), like.itemsize)
    grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(max(dim, table_dim), block_d))
    with on_device_of(like):
        _harmonized_embedding_fwd_kernel[grid](
            items,
            codebooks,
            hash_table,
            first,
            hashed,
            num_tokens,
            SIZES=tuple(sizes),
            DIM=dim,
            CODEBOOK_STRIDE=0 if codebooks is None else codebooks.stride(0),
            TABLE_DIM=table_dim,
            TABLE_STRIDE=0 if hash_table is None else hash_table.stride(0),
            HASH_MODE=hash_mode,
            NUM_HASHES=num_hashes,
            POOLING=pooling,
            COMBINE=combine,
            FIRST_DIM=math.prod(semantic_shape),
            SUM_DTYPE=tl.float64 if like.dtype == torch.float64 else tl.float32,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
            **OPTIONS,
        )
    return first, hashed


@triton.jit
def _find_rows_kernel(
    items, codebook_rows_ptr, table_rows_ptr, num_tokens,
    SIZES: tl.constexpr, NUM_CODEWORDS: tl.constexpr, HASH_MODE: tl.constexpr, NUM_HASHES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """codebook_rows [T, L], table_rows [T, k]; NUM_CODEWORDS and items.num_rows where a token reads none."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_batch = tokens < num_tokens
    ids, _, is_read = read_items(items, tokens, num_tokens, SIZES)
    first_row = 0  # of the level's codebook
    for level in tl.static_range(len(SIZES)):
        rows = tl.where(is_read, first_row + read_codes(items, ids, level, is_read), NUM_CODEWORDS)
        first_row += SIZES[level]
        tl.store(codebook_rows_ptr + tokens * len(SIZES) + level, rows.to(tl.int32), mask=in_batch)
    prefix = tl.zeros_like(ids)
    for j in tl.static_range(NUM_HASHES):
        if HASH_MODE == "prefix":
            prefix = fold_code(items, ids, prefix, j, is_read)
        rows = tl.where(is_read, table_rows(items, ids, prefix, j, HASH_MODE), items.num_rows)
        tl.store(
            table_rows_ptr + tokens * NUM_HASHES + j, rows.to(table_rows_ptr.dtype.element_ty), mask=in_batch
        )


def harmonized_embedding_backward(
    grad_first: Tensor | None,
    grad_hashed: Tensor | None,
    item_ids: Tensor,
    codes: Tensor | None,
    sizes: list[int],
    codebook_dim: int,
    num_rows: int,
    hash_dim: int,
    hash_mode: str,
    hash_constants: Tensor | None,
    divisor: int,
    num_items: int,
    pooling: str,
    padding_idx: int | None,
    combine: str | None,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients ``(codebooks [sum(sizes), D], hash table, its rows)``.

    The table's is ``[num_rows, hash_dim]``, or with ``sparse`` ``[U, hash_dim]`` for the U sorted rows that
    the last output names. A gradient that is not asked for (``codebook_dim`` or ``num_rows`` 0) has no elements.
    """
    num_tokens = item_ids.numel()
    wants_codebooks = codebook_dim > 0 and grad_first is not None
    grad_of_table = grad_hashed if combine is None else grad_first
    wants_table = num_rows > 0 and grad_of_table is not None
    like = grad_first if grad_first is not None else grad_hashed

    items, num_hashes = _items(
        item_ids, codes, num_rows, hash_mode, hash_constants, divisor, num_items, padding_idx
    )
    sizes_read = tuple(sizes) if wants_codebooks else ()
    row_dtype = torch.int32 if num_rows < 1 << 31 else torch.int64
    codebook_rows = item_ids.new_empty(num_tokens, len(sizes_read), dtype=torch.int32)
    rows_of_table = item_ids.new_empty(num_tokens, num_hashes if wants_table else 0, dtype=row_dtype)
    block_t = min(triton.next_power_of_2(num_tokens), tile_elements(256))
    if num_tokens > 0:
        with on_device_of(like):
            _find_rows_kernel[(triton.cdiv(num_tokens, block_t),)](
                items,
                codebook_rows,
                rows_of_table,
                num_tokens,
                SIZES=sizes_read,
                NUM_CODEWORDS=sum(sizes_read),
                HASH_MODE=hash_mode,
                NUM_HASHES=num_hashes if wants_table else 0,
                BLOCK_T=block_t,
                num_warps=4,
                **OPTIONS,
            )

    def as_matrix(grad: Tensor) -> Tensor:
        return grad.reshape(num_tokens, -1 if num_tokens else 0).contiguous()

    scale = 0.5 if combine == "mean" else 1.0
    grad_codebooks, grad_table = like.new_empty(0), like.new_empty(0)
    grad_rows = item_ids.new_empty(0, dtype=torch.int64)
    if wants_codebooks:
        level_stride = codebook_dim if pooling in ("levels", "concat") else 0
        codebook_scale = scale / len(sizes) if pooling == "mean" else scale
        grad_codebooks = _sum_by_codeword(
            codebook_rows, sizes, as_matrix(grad_first), level_stride, codebook_dim, codebook_scale
        )
    if wants_table:
        grad = as_matrix(grad_of_table)
        if combine == "concat":
            grad = grad[:, -hash_dim:]
        grad_table, grad_rows = sum_by_row(rows_of_table, num_rows, grad, 0, hash_dim, scale, sparse)
    return grad_codebooks, grad_table, grad_rows


def _sum_by_codeword(
    rows: Tensor, sizes: list[int], grad: Tensor, level_stride: int, dim: int, scale: float
) -> Tensor:
    if products_are_cheaper(len(rows), sizes, dim, grad.dtype):
        return one_hot_sums(rows, sizes, grad, level_stride, dim, scale)
    return sum_by_row(rows, sum(sizes), grad, level_stride, dim, scale, sparse=False)[0]


def products_are_cheaper(num_tokens: int, sizes: list[int], dim: int, dtype: torch.dtype) -> bool:
    """Whether one-hot products sum the gradients of the codebooks sooner than sorting does: kernels/README.md."""
    if dtype == torch.float64 or num_tokens == 0:
        return False
    products = 3 if dtype == torch.float32 else 1
    seconds_of_products = 10e-6 + 2 * products * num_tokens * sum(sizes) * dim / 400e12
    seconds_of_sorting = 40e-6 + num_tokens * len(sizes) * (104 + dim * dtype.itemsize) / 2.5e12
    return seconds_of_products < seconds_of_sorting


def _items(
    item_ids: Tensor,
    codes: Tensor | None,
    num_rows: int,
    hash_mode: str,
    hash_constants: Tensor | None,
    divisor: int,
    num_items: int,
    padding_idx: int | None,
) -> tuple[Items, int]:
    """What kernels know of the items, and how many rows of the table each of them reads."""
    if num_rows == 0:
        hash_constants, num_hashes = None, 0
    elif hash_constants is None:
        num_hashes = 2 if hash_mode == "qr" else 1
    else:
        hash_constants, num_hashes = hash_constants.contiguous(), hash_constants.shape[0]
    strides = (0, 0) if codes is None else codes.stride()
    items = Items(
        item_ids.contiguous(), codes, *strides, num_items, padding_idx, hash_constants, divisor, num_rows
    )
    return items, num_hashes


def _with_contiguous_rows(matrix: Tensor | None) -> Tensor | None:
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()


def _forward_tile(num_tokens: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Tokens and columns of a program: 64 bytes a thread, fewer where there are not enough programs for a GPU."""
    block_d = min(triton.next_power_of_2(dim), 1024 // itemsize)
    block_t = min(triton.next_power_of_2(num_tokens), max(1, tile_elements(8192 // itemsize) // block_d))
    while block_t * block_d > tile_elements(2048 // itemsize) and triton.cdiv(num_tokens, block_t) < 256:
        block_t //= 2
    return block_t, block_d


def representative_calls() -> dict[str, Callable[[], object]]:
    """For ``python -m h2rec.kernels.aot``: a batch of 128 x 200 tokens, a million items, 4 codebooks."""
    meta = partial(torch.empty, device="meta")
    num_tokens, num_items, dim = 25_600, 1_000_000, 64

    def arguments(hash_mode: str, pooling: str, combine: str | None) -> dict:
        return {
            "item_ids": meta(num_tokens, dtype=torch.int64),
            "codes": meta(num_items, 4, dtype=torch.int32),
            "hash_mode": hash_mode,
            "hash_constants": meta(4, 2, dtype=torch.int64) if hash_mode in ("multi", "prefix") else None,
            "divisor": 1000,
            "num_items": num_items,
            "pooling": pooling,
            "padding_idx": 0,
            "combine": combine,
            "sparse": False,
        }

    def forward(dtype: torch.dtype, *options) -> None:
        codebooks, table = meta(4 * 256, dim, dtype=dtype), meta(num_items, dim, dtype=dtype)
        harmonized_embedding(codebooks=codebooks, sizes=[256] * 4, hash_table=table, **arguments(*options))

    def backward(dtype: torch.dtype, size: int, num_rows: int, *options) -> None:
        harmonized_embedding_backward(
            meta(num_tokens, dim, dtype=dtype),
            meta(num_tokens, dim, dtype=dtype),
            sizes=[size] * 4,
            codebook_dim=dim,
            num_rows=num_rows,
            hash_dim=dim,
            **arguments(*options),
        )

    return {
        "forward fp32, direct": lambda: forward(torch.float32, "direct", "sum", None),
        "forward bf16, multi, levels": lambda: forward(torch.bfloat16, "multi", "levels", None),
        "forward fp64, prefix, mean": lambda: forward(torch.float64, "prefix", "mean", "mean"),
        "backward fp32, products": lambda: backward(torch.float32, 256, num_items, "direct", "sum", None),
        "backward bf16, products": lambda: backward(torch.bfloat16, 256, num_items, "multi", "sum", None),
        "backward fp64": lambda: backward(torch.float64, 8192, 0, "direct", "mean", None),
    }

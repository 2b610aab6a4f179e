"""What every kernel of harmonized_embedding does first: from tokens to items, their codes, and their rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# 2^64 / golden ratio, odd, as a signed 64-bit integer: folds a tuple of codes into one integer.
_FOLD = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_LOW_32_BITS = tl.constexpr(0xFFFFFFFF)


class Items(NamedTuple):
    """Tensors and numbers that kernels take as one argument."""

    ids: Any  # [T]
    codes: Any  # [num_items, L], or None
    item_stride: Any  # of codes
    level_stride: Any
    num_items: Any
    padding_idx: Any  # or None
    constants: Any  # of the hash functions, [k, 2], or None
    divisor: Any
    num_rows: Any  # of the table


@triton.jit
def read_items(items, tokens, num_tokens, SIZES: tl.constexpr):
    """Of the tokens [BT]: ids, int64; whether they are items and not padding; whether all their rows may be read.

    With ``SIZES``, of the codebooks, the codes have to be in range as well as the ids.
    """
    in_batch = tokens < num_tokens
    ids = tl.load(items.ids + tokens, mask=in_batch, other=0).to(tl.int64)
    is_item = in_batch
    if items.padding_idx is not None:
        is_item = is_item & (ids != items.padding_idx)
    is_read = is_item & (ids >= 0) & (ids < items.num_items)
    for level in tl.static_range(len(SIZES)):
        code = read_codes(items, ids, level, is_read)
        is_read = is_read & (code >= 0) & (code < SIZES[level])
    return ids, is_item, is_read


@triton.jit
def read_codes(items, ids, level, is_read):
    return tl.load(
        items.codes + ids * items.item_stride + level * items.level_stride, mask=is_read, other=0
    ).to(tl.int64)


@triton.jit
def fold_code(items, ids, prefix, level, is_read):
    """The codes up to ``level`` as one integer, from those before it."""
    return prefix * _FOLD + read_codes(items, ids, level, is_read) + 1


@triton.jit
def table_rows(items, ids, prefix, j, HASH_MODE: tl.constexpr):
    """The j-th row of the table that each item reads, [BT]; ``prefix``: the item's first j + 1 codes as one integer."""
    if HASH_MODE == "direct":
        rows = ids
    elif HASH_MODE == "qr":
        rows = ids % items.divisor if j == 0 else items.divisor + ids // items.divisor
    else:
        keys = prefix if HASH_MODE == "prefix" else ids
        mixed = keys * tl.load(items.constants + 2 * j) + tl.load(items.constants + 2 * j + 1)
        rows = ((((mixed >> 32) & _LOW_32_BITS) * items.num_rows) >> 32) & _LOW_32_BITS
    return rows

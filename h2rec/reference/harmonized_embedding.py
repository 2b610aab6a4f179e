"""Semantic and hash embeddings of item ids, and their gradients, in plain PyTorch."""

import itertools

import torch
from torch import Tensor

# 2^64 / golden ratio, odd, as a signed 64-bit integer: folds a code tuple into one integer.
_FOLD = 0x9E3779B97F4A7C15 - (1 << 64)
_LOW_32_BITS = 0xFFFFFFFF


def hash_rows(
    item_ids: Tensor,
    codes: Tensor | None,
    mode: str,
    constants: Tensor | None,
    divisor: int,
    num_rows: int,
) -> Tensor:
    """Rows of the hash table for each item, ``[T] -> [T, k]`` int64. ``codes`` are the items' own, ``[T, L]``.

    Integer arithmetic is modulo 2^64, which is what int64 tensors do; ``>>`` keeps the sign, hence the masks.
    """
    if mode == "direct":
        return item_ids.unsqueeze(1)
    if mode == "qr":
        return torch.stack([item_ids % divisor, divisor + item_ids // divisor], dim=1)
    if mode == "multi":
        keys = item_ids.unsqueeze(1)  # [T, 1]
    else:  # prefix: one key per level, the tuple (code_0 .. code_l) folded to one integer
        key = torch.zeros_like(item_ids)
        keys_by_level = []
        for level in range(codes.shape[1]):
            key = key * _FOLD + codes[:, level] + 1
            keys_by_level.append(key)
        keys = torch.stack(keys_by_level, dim=1)  # [T, L]
    mixed = keys * constants[:, 0] + constants[:, 1]  # [T, k]
    return ((((mixed >> 32) & _LOW_32_BITS) * num_rows) >> 32) & _LOW_32_BITS


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
    ids, valid, out_of_range = _flatten_ids(item_ids, padding_idx, num_items)
    item_codes = None if codes is None else codes[ids].to(torch.int64)  # [T, L]
    outputs = []
    if codebooks is not None:
        rows = codebooks[_codebook_rows(item_codes, sizes)]  # [T, L, D]
        outputs.append(_pool(rows, pooling))
    if hash_table is not None:
        index = hash_rows(ids, item_codes, hash_mode, hash_constants, divisor, hash_table.shape[0])  # [T, k]
        outputs.append(_sum(hash_table[index]))
    if combine is not None:
        outputs = [_combine(outputs[0], outputs[1], combine)]
    shaped = []
    for output in outputs:
        per_item = (slice(None),) + (None,) * (output.dim() - 1)
        output = output.masked_fill(~valid[per_item], 0)
        if not item_ids.is_cpu:  # on the CPU ids have been checked
            output = output.masked_fill(out_of_range[per_item], torch.nan)
        shaped.append(output.view(item_ids.shape + output.shape[1:]))
    absent = item_ids.new_empty(0, dtype=shaped[0].dtype)
    if combine is not None:
        return shaped[0], absent
    semantic = shaped.pop(0) if codebooks is not None else absent
    return semantic, shaped[0] if hash_table is not None else absent


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
    ids, valid, out_of_range = _flatten_ids(item_ids, padding_idx, num_items)
    valid = valid & ~out_of_range
    ids = ids[valid]
    item_codes = None if codes is None else codes[ids].to(torch.int64)
    some_grad = grad_first if grad_first is not None else grad_hashed
    dtype = some_grad.dtype
    if combine is not None:
        grad_first, grad_hashed = _split_combined(grad_first, combine, hash_dim)

    grad_codebooks = some_grad.new_empty(0)
    if codebook_dim and grad_first is not None:
        width = codebook_dim * (len(sizes) if pooling in ("levels", "concat") else 1)
        grad = grad_first.reshape(-1, width)[valid]
        grad = _unpool(grad, pooling, len(sizes), codebook_dim)  # [T, L, D]
        rows = _codebook_rows(item_codes, sizes)  # [T, L]
        grad_codebooks = _sum_by_row(grad.flatten(0, 1), rows.flatten(), sum(sizes)).to(dtype)

    grad_table, grad_rows = some_grad.new_empty(0), item_ids.new_empty(0, dtype=torch.int64)
    if num_rows and grad_hashed is not None:
        grad = grad_hashed.reshape(-1, hash_dim)[valid]  # [T, D_h]
        rows = hash_rows(ids, item_codes, hash_mode, hash_constants, divisor, num_rows)  # [T, k]
        grad = grad.unsqueeze(1).expand(-1, rows.shape[1], -1).flatten(0, 1)
        rows = rows.flatten()
        if sparse:
            grad_rows, rows = rows.unique(return_inverse=True)
        grad_table = _sum_by_row(grad, rows, grad_rows.shape[0] if sparse else num_rows).to(dtype)
    return grad_codebooks, grad_table, grad_rows


def _flatten_ids(item_ids: Tensor, padding_idx: int | None, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids as ``[T]`` with 0 in place of padding and of ids out of range; where ids are no padding; and where bad."""
    ids = item_ids.reshape(-1).to(torch.int64)
    valid = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx
    out_of_range = valid & ((ids < 0) | (ids >= num_items))
    return ids.masked_fill(~valid | out_of_range, 0), valid, out_of_range


def _codebook_rows(item_codes: Tensor, sizes: list[int]) -> Tensor:
    """Rows in the packed codebooks, ``[T, L]``."""
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return torch.stack(
        [code + start for code, start in zip(item_codes.unbind(1), starts, strict=True)], dim=1
    )


def _sum(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).sum(1).to(rows.dtype)


def _pool(rows: Tensor, pooling: str) -> Tensor:
    if pooling == "levels":
        return rows
    if pooling == "concat":
        return rows.flatten(1)
    if pooling == "sum":
        return _sum(rows)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(1).to(rows.dtype)


def _unpool(grad: Tensor, pooling: str, num_levels: int, dim: int) -> Tensor:
    if pooling in ("levels", "concat"):
        return grad.reshape(-1, num_levels, dim)
    if pooling == "mean":
        grad = grad.double() / num_levels
    return grad.unsqueeze(1).expand(-1, num_levels, -1)


def _combine(semantic: Tensor, hashed: Tensor, combine: str) -> Tensor:
    if combine == "concat":
        return torch.cat([semantic, hashed], dim=1)
    total = _sum(torch.stack([semantic, hashed], dim=1))
    return total if combine == "sum" else total / 2


def _split_combined(grad: Tensor, combine: str, hash_dim: int) -> tuple[Tensor, Tensor]:
    if combine == "concat":
        return grad[..., :-hash_dim], grad[..., -hash_dim:]
    if combine == "mean":
        grad = grad.double() / 2
    return grad, grad


def _sum_by_row(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """``out[r] = sum of grad[i] with rows[i] == r``, in fp64 and in an order fixed on every device (no atomics)."""
    return torch.ops.aten.embedding_dense_backward(grad.double(), rows, num_rows, -1, False)

"""The backend "cpp": brings arguments into the form that the kernels of h2rec._C take, and calls them."""

import torch
from torch import Tensor

from h2rec import reference
from h2rec.ops._checks import check_items


def residual_quantize(
    x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int
) -> tuple[Tensor, Tensor]:
    if not codebooks.isfinite().all():  # what is nearest then is for plain code to say
        return reference.residual_quantize(x, codebooks, sizes, beam_size)
    compute = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    return torch.ops.h2rec._cpp_residual_quantize(x, codebooks.to(compute).contiguous(), sizes, beam_size)


def alignment_loss(
    hash_emb: Tensor, semantic_emb: Tensor, temperature: Tensor, *arguments
) -> tuple[Tensor, Tensor]:
    dtype = _alignment_dtype(hash_emb, temperature)
    if dtype is None:
        return reference.alignment_loss(hash_emb, semantic_emb, temperature, *arguments)
    return torch.ops.h2rec._cpp_alignment_loss.default(
        *_alignment_arguments(dtype, hash_emb, semantic_emb, temperature, *arguments)
    )


def alignment_loss_backward(
    grad_row_sums: Tensor,
    grad_column_sums: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    hash_emb: Tensor,
    semantic_emb: Tensor,
    temperature: Tensor,
    *arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = grad_row_sums.contiguous(), grad_column_sums.contiguous(), row_sums, column_sums
    dtype = _alignment_dtype(hash_emb, temperature)
    if dtype is None:
        return reference.alignment_loss_backward(*sums, hash_emb, semantic_emb, temperature, *arguments)
    grad_hash, grad_semantic, grad_temperature = torch.ops.h2rec._cpp_alignment_loss_backward.default(
        *sums, *_alignment_arguments(dtype, hash_emb, semantic_emb, temperature, *arguments)
    )
    return (
        grad_hash.to(hash_emb.dtype),
        grad_semantic.to(semantic_emb.dtype),
        torch.full_like(temperature, grad_temperature),
    )


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
    """Checks ids and codes while it reads them: the caller need not."""
    first, hashed, fault = torch.ops.h2rec._cpp_harmonized_embedding.default(
        item_ids,
        codes,
        codebooks,
        sizes,
        hash_table,
        hash_mode,
        hash_constants,
        divisor,
        num_items,
        pooling,
        padding_idx,
        combine,
    )
    if fault:
        check_items(item_ids, codes, sizes, num_items, padding_idx)
    return first, hashed


def harmonized_embedding_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.h2rec._cpp_harmonized_embedding_backward.default(*arguments)


def _alignment_dtype(hash_emb: Tensor, temperature: Tensor) -> torch.dtype | None:
    """What to compute in: the kernels keep no running maximum, and exp(+-1 / temperature) must fit with room for sums.

    None: not even fp64 is wide enough, and plain code must serve.
    """
    largest_logit = 1 / temperature.item()
    if largest_logit > 600:
        return None
    return torch.float64 if hash_emb.dtype == torch.float64 or largest_logit > 64 else torch.float32


def _alignment_arguments(
    dtype,
    hash_emb,
    semantic_emb,
    temperature,
    item_ids,
    codes,
    min_shared_codes,
    pair_index,
    pair_weight,
    first_row,
    num_rows,
) -> tuple:
    return (
        hash_emb.to(dtype).contiguous(),
        semantic_emb.to(dtype).contiguous(),
        temperature.item(),
        None if item_ids is None else _labels(item_ids).contiguous(),
        None if codes is None else _labels(codes).T.contiguous(),
        min_shared_codes,
        *_pairs_by_row(len(hash_emb), pair_index, pair_weight, dtype),
        first_row,
        num_rows,
    )


def _labels(ids: Tensor) -> Tensor:
    """int32 that are equal where ``ids`` are."""
    labels = ids.to(torch.int32)
    if ids.dtype == torch.int64 and not torch.equal(labels.to(torch.int64), ids):
        labels = ids.unique(return_inverse=True)[1].to(torch.int32)
    return labels


def _pairs_by_row(batch_size: int, pair_index: Tensor | None, pair_weight: Tensor | None, dtype: torch.dtype):
    """Both orders of each pair with its largest weight: where each row starts ``[B + 1]``, columns and weights."""
    if pair_index is None:
        return None, None, None
    first, second = pair_index.to(torch.int64)
    flat, inverse = torch.cat([first * batch_size + second, second * batch_size + first]).unique(
        return_inverse=True
    )
    weights = torch.zeros(len(flat), dtype=dtype).scatter_reduce_(
        0, inverse, pair_weight.to(dtype).repeat(2), "amax"
    )
    start = torch.searchsorted(flat, torch.arange(batch_size + 1) * batch_size)
    return start, (flat % batch_size).to(torch.int32), weights

"""The code-guided contrastive loss with its B x B matrices written out (design: kernels/README.md)."""

import torch
from torch import Tensor

_MIN_NORM = 1e-12


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
    """Sums over the rows of ``hash_emb`` from ``first_row`` on, as logarithms in fp64.

    Returns:
        row_sums ``[2, num_rows]``: log P_i of the positives w_ij e_ij and log N_i of the rest (1 - w_ij) e_ij, over
            all j; column_sums ``[2, B]``: log Q_j and log M_j, the same over these rows.
    """
    rows = slice(first_row, first_row + num_rows)
    logits, _, _ = _logits(hash_emb[rows], semantic_emb, temperature)  # [R, B]
    weights = positive_weights(logits, rows, item_ids, codes, min_shared_codes, pair_index, pair_weight)
    parts = torch.stack([logits + weights.log(), logits + (1 - weights).log()]).double()
    return parts.logsumexp(2), parts.logsumexp(1)


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
    """From the sums ``[2, B]`` over the whole batch and their gradients.

    Returns:
        The gradients ``[num_rows, D]`` of the rows of ``hash_emb`` and ``semantic_emb`` from ``first_row`` on, and
        what these rows of ``hash_emb`` add to the temperature's.
    """
    rows = slice(first_row, first_row + num_rows)
    logits, (unit_h, norm_h), (unit_s, norm_s) = _logits(hash_emb, semantic_emb, temperature)
    weights = positive_weights(
        logits, slice(None), item_ids, codes, min_shared_codes, pair_index, pair_weight
    )
    by_row = _grad_of_log_sums(logits, weights, grad_row_sums.unsqueeze(2), row_sums.unsqueeze(2))
    by_column = _grad_of_log_sums(logits, weights, grad_column_sums, column_sums)
    grad_logits = by_row + by_column  # [B, B]
    scale = temperature.to(logits)
    grad_h = _unit_backward(grad_logits[rows] @ unit_s / scale, unit_h[rows], norm_h[rows])
    grad_s = _unit_backward(grad_logits[:, rows].T @ unit_h / scale, unit_s[rows], norm_s[rows])
    grad_temperature = -(grad_logits[rows] * logits[rows]).sum() / scale
    return grad_h.to(hash_emb.dtype), grad_s.to(semantic_emb.dtype), grad_temperature.to(temperature)


def _grad_of_log_sums(logits: Tensor, weights: Tensor, grads: Tensor, log_sums: Tensor) -> Tensor:
    # log N is -inf where every pair is a positive: then there is nothing to divide by N.
    log_sums = log_sums.clamp_min(torch.finfo(logits.dtype).min)
    rounded = log_sums.to(logits.dtype)
    log_p, log_n = rounded
    grad_p, grad_n = (grads * (rounded - log_sums).exp()).to(
        logits.dtype
    )  # nothing of the logarithms is lost
    # The weight goes into the exponent: the exponential alone may be infinite.
    positive = (logits + weights.log() - log_p).exp()
    negative = (logits + (1 - weights).log() - log_n).exp()
    return grad_p * positive + grad_n * negative


def positive_weights(
    logits: Tensor,
    rows: slice,
    item_ids: Tensor | None,
    codes: Tensor | None,
    min_shared_codes: int,
    pair_index: Tensor | None,
    pair_weight: Tensor | None,
) -> Tensor:
    """The weights w_ij ``[R, B]`` of ``rows``: 1 for positives by position, item or codes, else the largest given."""
    num_rows, batch_size = logits.shape
    positions = torch.arange(batch_size, device=logits.device)
    positive = positions[rows, None] == positions
    weights = logits.new_zeros(num_rows * batch_size + 1)  # the last one takes the pairs of other rows
    if pair_index is not None:
        row, column = torch.cat([pair_index, pair_index.flip(0)], dim=1).to(torch.int64)
        row = row - (rows.start or 0)
        place = torch.where((row >= 0) & (row < num_rows), row * batch_size + column, len(weights) - 1)
        weights.scatter_reduce_(0, place, pair_weight.to(weights).repeat(2), "amax")
    if item_ids is not None:
        positive |= item_ids[rows, None] == item_ids
    if codes is not None:
        shared = torch.zeros(positive.shape, dtype=torch.int32, device=logits.device)
        for level_codes in codes.unbind(1):
            shared += level_codes[rows, None] == level_codes
        positive |= shared >= min_shared_codes
    return weights[:-1].view(num_rows, batch_size).masked_fill(positive, 1)


def _logits(hash_emb: Tensor, semantic_emb: Tensor, temperature: Tensor):
    unit_h, norm_h = _unit(hash_emb)
    unit_s, norm_s = _unit(semantic_emb)
    logits = unit_h @ unit_s.T / temperature.to(unit_h)
    return logits, (unit_h, norm_h), (unit_s, norm_s)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one and their norms; scaled by a power of two first (exact), so that no square overflows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    exponent = x.abs().amax(1, keepdim=True).frexp().exponent.clamp(-60, 126)
    scaled = x * torch.exp2(-exponent.to(x.dtype))
    length = scaled.square().sum(1, keepdim=True).sqrt()
    norm = length * torch.exp2(exponent.to(x.dtype))
    is_zero = norm < _MIN_NORM
    return (scaled / length.masked_fill(is_zero, 1)).masked_fill(is_zero, 0), norm.masked_fill(
        is_zero, torch.inf
    )


def _unit_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """A row that counts as zero has an infinite norm here, and so a zero gradient."""
    return (grad - unit * (unit * grad).sum(1, keepdim=True)) / norm

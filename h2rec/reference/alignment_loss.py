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
) -> tuple[Tensor, Tensor]:
    """Returns ``(losses [B], statistics [4, B])``: log P, the row losses, log Q, the column losses.

    A loss is log(1 + N / P), where N sums what is no positive, (1 - w_ij) e_ij: exact also where the loss is near 0,
    which the difference of log R and log P would not be.
    """
    logits, _, _ = _logits(hash_emb, semantic_emb, temperature)  # [B, B]
    weights = positive_weights(logits, item_ids, codes, min_shared_codes, pair_index, pair_weight)
    positive, negative = logits + weights.log(), logits + (1 - weights).log()
    log_p, log_q = positive.logsumexp(1), positive.logsumexp(0)
    rows = _log1p_exp(negative.logsumexp(1) - log_p)
    columns = _log1p_exp(negative.logsumexp(0) - log_q)
    return (rows + columns) / 2, torch.stack([log_p, rows, log_q, columns])


def alignment_loss_backward(
    grad_losses: Tensor,
    statistics: Tensor,
    hash_emb: Tensor,
    semantic_emb: Tensor,
    temperature: Tensor,
    item_ids: Tensor | None,
    codes: Tensor | None,
    min_shared_codes: int,
    pair_index: Tensor | None,
    pair_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``hash_emb``, ``semantic_emb`` and ``temperature``."""
    logits, (unit_h, norm_h), (unit_s, norm_s) = _logits(hash_emb, semantic_emb, temperature)
    weights = positive_weights(logits, item_ids, codes, min_shared_codes, pair_index, pair_weight)
    log_p, rows, log_q, columns = statistics
    by_row = _grad_of_log_ratio(logits, weights, log_p[:, None], rows[:, None])
    by_column = _grad_of_log_ratio(logits, weights, log_q, columns)
    grad_logits = (grad_losses[:, None] * by_row + grad_losses * by_column) / 2  # [B, B]
    scale = temperature.to(logits)
    grad_h = _unit_backward(grad_logits @ unit_s / scale, unit_h, norm_h)
    grad_s = _unit_backward(grad_logits.T @ unit_h / scale, unit_s, norm_s)
    grad_temperature = -(grad_logits * logits).sum() / scale
    return grad_h.to(hash_emb.dtype), grad_s.to(semantic_emb.dtype), grad_temperature.to(temperature)


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _grad_of_log_ratio(logits: Tensor, weights: Tensor, log_p: Tensor, loss: Tensor) -> Tensor:
    """``e / R - w e / P`` with log R = log P + loss, written so that nothing cancels where the loss is near 0."""
    negative = (1 - weights) * (logits - log_p - loss).exp()
    # The weight goes into the exponent: beside a positive far below it, a negative's exponential alone may be infinite.
    return negative + (logits + weights.log() - log_p).exp() * torch.expm1(-loss)


def positive_weights(
    logits: Tensor,
    item_ids: Tensor | None,
    codes: Tensor | None,
    min_shared_codes: int,
    pair_index: Tensor | None,
    pair_weight: Tensor | None,
) -> Tensor:
    """The weights w_ij ``[B, B]``: 1 for positives by position, item or codes, else the largest given pair weight."""
    weights = torch.zeros_like(logits)
    if pair_index is not None:
        first, second = pair_index.to(torch.int64)
        flat = first * logits.shape[0] + second
        weights.view(-1).scatter_reduce_(0, flat, pair_weight.to(weights), "amax")
        weights = weights.maximum(weights.T)
    positive = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    if item_ids is not None:
        positive |= item_ids[:, None] == item_ids
    if codes is not None:
        shared = torch.zeros(positive.shape, dtype=torch.int32, device=logits.device)
        for level_codes in codes.unbind(1):
            shared += level_codes[:, None] == level_codes
        positive |= shared >= min_shared_codes
    return weights.masked_fill(positive, 1)


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

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
    """Returns ``(losses [B], log_sums [4, B])``; the rows of the second are log R, log P, log C and log Q."""
    logits, _, _ = _logits(hash_emb, semantic_emb, temperature)  # [B, B]
    weights = positive_weights(logits, item_ids, codes, min_shared_codes, pair_index, pair_weight)
    weighted = logits + weights.log()
    log_sums = torch.stack(
        [logits.logsumexp(1), weighted.logsumexp(1), logits.logsumexp(0), weighted.logsumexp(0)]
    )
    log_r, log_p, log_c, log_q = log_sums
    return ((log_r - log_p) + (log_c - log_q)) / 2, log_sums


def alignment_loss_backward(
    grad_losses: Tensor,
    log_sums: Tensor,
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
    log_r, log_p, log_c, log_q = log_sums
    by_row = (logits - log_r[:, None]).exp() - weights * (logits - log_p[:, None]).exp()
    by_column = (logits - log_c).exp() - weights * (logits - log_q).exp()
    grad_logits = (grad_losses[:, None] * by_row + grad_losses * by_column) / 2  # [B, B]
    scale = temperature.to(logits)
    grad_h = _unit_backward(grad_logits @ unit_s / scale, unit_h, norm_h)
    grad_s = _unit_backward(grad_logits.T @ unit_h / scale, unit_s, norm_s)
    grad_temperature = -(grad_logits * logits).sum() / scale
    return grad_h.to(hash_emb.dtype), grad_s.to(semantic_emb.dtype), grad_temperature.to(temperature)


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
    """Rows of length one and their norms; scaled by the largest magnitude first, so that no square overflows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(1, keepdim=True)
    scaled = x / largest.clamp_min(torch.finfo(x.dtype).tiny)
    length = scaled.square().sum(1, keepdim=True).sqrt()
    norm = largest * length
    is_zero = norm < _MIN_NORM
    return (scaled / length.clamp_min(1)).masked_fill(is_zero, 0), norm.masked_fill(is_zero, torch.inf)


def _unit_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """A row that counts as zero has an infinite norm here, and so a zero gradient."""
    return (grad - unit * (unit * grad).sum(1, keepdim=True)) / norm

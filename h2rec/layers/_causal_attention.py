"""The one place where the project calls attention: always causal, never with a T x T mask."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention in which position t sees the positions up to and including t.

    Sequences are padded on the right, so a real position never sees padding and no mask is needed.
    Attention weights get no dropout: the fused CPU kernel has none, and callers drop the output instead.

    Args:
        query, key, value: ``[N, T, D]``; D must be a multiple of ``num_heads``.

    Returns:
        ``[N, T, D]``
    """
    query, key, value = (_split(x, num_heads) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [N, H, T, D / H]
    return out.transpose(1, 2).flatten(2)


def causal_attention_at(
    positions: Tensor, query: Tensor, key: Tensor, value: Tensor, num_heads: int
) -> Tensor:
    """What `causal_attention` gives at one position of each sequence.

    Args:
        positions: ``[N]``.
        query: ``[N, D]``, of that position.
        key, value: ``[N, T, D]``.

    Returns:
        ``[N, D]``
    """
    query, key, value = (_split(x, num_heads) for x in (query.unsqueeze(1), key, value))
    visible = torch.arange(key.shape[2], device=key.device) <= positions[:, None]  # [N, T]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None])
    return out.flatten(1)  # [N, H, 1, D / H] -> [N, D]


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[N, T, D] -> [N, H, T, D / H]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

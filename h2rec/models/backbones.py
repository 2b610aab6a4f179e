"""Sequence encoders: vectors of a sequence in, vectors that know their past out."""

import torch.nn.functional as F
from torch import Tensor, nn

from h2rec.layers._causal_attention import causal_attention


class CausalAttention(nn.Module):
    """Multi-head attention of one sequence to another (or to itself), causal.

    Args:
        dim: size D of the vectors.
        num_heads: attention heads; must divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} and dim={dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """``[B, T, D]``, ``[B, T, D]`` -> ``[B, T, D]``; output t sees queries at t and context up to t."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self.output(causal_attention(self.query(queries), key, value, self.num_heads))


class _TransformerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, num_heads)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, dim)
        self.contract = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed))
        hidden = F.relu(self.expand(self.feed_forward_norm(x)))
        return x + self.dropout(self.contract(self.dropout(hidden)))


class SASRecBackbone(nn.Module):
    """Pre-norm causal transformer with feed-forward layers as wide as the model and a final norm.

    Source: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.

    Args:
        dim: size D of the vectors.
        num_layers: transformer blocks.
        num_heads: attention heads; must divide ``dim``.
        dropout: probability after every sublayer and inside the feed-forward layers.
    """

    def __init__(self, dim: int, *, num_layers: int = 2, num_heads: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.blocks = nn.ModuleList(_TransformerBlock(dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``"""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PositionedInput(nn.Module):
    """What enters a backbone: vectors scaled by sqrt(D), plus a learned position, then dropout.

    Args:
        dim: size D of the vectors.
        max_length: number of positions.
        dropout: probability.
    """

    def __init__(self, dim: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.position = nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` or ``[B, T, L, D]`` -> the same shape"""
        position = self.position.weight[: x.shape[1]]  # [T, D]
        if x.dim() == 4:
            position = position.unsqueeze(1)
        return self.dropout(x * self.scale + position)

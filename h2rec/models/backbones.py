"""Sequence encoders: vectors of a sequence in, vectors that know their past out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from h2rec.layers._causal_attention import causal_attention, causal_attention_at
from h2rec.layers._dropout import Dropout
from h2rec.ops._checks import check_option, check_size


def vectors_at(x: Tensor, positions: Tensor) -> Tensor:
    """One vector of each sequence: ``[B, T, D]``, ``[B]`` -> ``[B, D]``."""
    return x[torch.arange(len(positions), device=positions.device), positions]


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

    def at(self, positions: Tensor, queries: Tensor, context: Tensor) -> Tensor:
        """One position of each sequence: ``[B]``, its queries ``[B, D]``, ``[B, T, D]`` -> ``[B, D]``."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return self.output(causal_attention_at(positions, self.query(queries), key, value, self.num_heads))


class Backbone(nn.Module):
    """A causal sequence encoder: output t depends on positions up to t."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``"""
        raise NotImplementedError

    def at(self, positions: Tensor, x: Tensor) -> Tensor:
        """The output at one position of each sequence: ``[B]``, ``[B, T, D]`` -> ``[B, D]``."""
        return vectors_at(self(x), positions)


class _SASRecBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, num_heads)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, dim)
        self.contract = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        return self._feed_forward(x + self.dropout(self.attention(normed, normed)))

    def at(self, positions: Tensor, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        answer = self.attention.at(positions, vectors_at(normed, positions), normed)
        return self._feed_forward(vectors_at(x, positions) + self.dropout(answer))

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.expand(self.feed_forward_norm(x)))
        return x + self.dropout(self.contract(self.dropout(hidden)))


class SASRecBackbone(Backbone):
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
        check_size("num_layers", num_layers)
        self.blocks = nn.ModuleList(_SASRecBlock(dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def at(self, positions: Tensor, x: Tensor) -> Tensor:
        # The last block answers one position only.
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.norm(last.at(positions, x))


class _BERT4RecBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = CausalAttention(dim, num_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, x)))
        return self.feed_forward_norm(x + self.dropout(self.contract(F.gelu(self.expand(x)))))


class BERT4RecBackbone(Backbone):
    """BERT4Rec's blocks under a causal mask: post-norm, GELU, feed-forward layers four times as wide.

    BERT4Rec itself looks both ways and learns from masked positions. Here every position predicts the next
    item, which a look to the right would show it.

    Source: Sun et al., BERT4Rec, CIKM 2019.

    Args:
        dim, num_layers, num_heads, dropout: as in `SASRecBackbone`.
    """

    def __init__(self, dim: int, *, num_layers: int = 2, num_heads: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        check_size("num_layers", num_layers)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(_BERT4RecBlock(dim, num_heads, dropout) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return x


class GRU4RecBackbone(Backbone):
    """Gated recurrent units as wide as the model, and a linear map of their states.

    ``torch.compile`` leaves ``nn.GRU`` outside its graphs, so ``fullgraph=True`` refuses this backbone.

    Source: Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016.

    Args:
        dim: size D of the vectors.
        num_layers: recurrent layers.
        dropout: probability between them and on their states.
        num_heads: has no meaning here; backbones are built alike.
    """

    def __init__(self, dim: int, *, num_layers: int = 2, num_heads: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        check_size("num_layers", num_layers)
        self.gru = nn.GRU(dim, dim, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.output(self.dropout(states))


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "sasrec": SASRecBackbone,
    "gru4rec": GRU4RecBackbone,
    "bert4rec": BERT4RecBackbone,
}


def make_backbone(name: str, dim: int, *, num_layers: int, num_heads: int, dropout: float) -> Backbone:
    """Builds a backbone by name.

    Raises:
        ValueError: an unknown name, or a size out of range.
    """
    check_option("backbone", name, BACKBONES)
    return BACKBONES[name](dim, num_layers=num_layers, num_heads=num_heads, dropout=dropout)


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
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` or ``[B, T, L, D]`` -> the same shape"""
        position = self.position.weight[: x.shape[1]]  # [T, D]
        if x.dim() == 4:
            position = position.unsqueeze(1)
        return self.dropout(torch.add(position, x, alpha=self.scale))

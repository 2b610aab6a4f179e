"""The hash branch's mixing: every level of the semantic ID asks the hash sequence, and a gate weighs the answers."""

import math

import torch
from torch import Tensor, nn

from h2rec.layers._causal_attention import causal_attention
from h2rec.layers._dropout import Dropout
from h2rec.ops._checks import check_size


class GranularityCrossAttention(nn.Module):
    """Gated causal cross attention from each level of the semantic IDs to the hash sequence.

    Level l's sequence gives the queries, the hash sequence keys and values, each level with projections of
    its own. With A_l the answer of level l, position t gets::

        mixed_t = sum_l gate_tl A_l,t          gate_t = softmax_l(MLP(hashed_t) + prior)

    where ``prior`` falls linearly from 1.0 (coarsest level) to 0.2. All levels go through one attention
    call. Output t, the gate included, depends on positions up to t only.

    Source: arXiv 2512.10388, dual-branch modelling (multi-granularity cross attention and its gate). There
    the gate reads the last hash vector of the sequence; with a loss at every position that would show each
    position the future, so here position t reads the vector at t, its own prefix's last. The authors' code
    also feeds the prior to the MLP, which adds nothing: a constant input is a bias.

    Args:
        dim: size D of the vectors.
        num_levels: number L of levels.
        num_heads: attention heads per level; must divide ``dim``.
        dropout: probability on the mixed output.

    Raises:
        ValueError: a size is below 1, ``num_heads`` does not divide ``dim``, or the inputs' shapes do not fit.
    """

    prior: Tensor

    def __init__(self, dim: int, num_levels: int, *, num_heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        check_size("num_levels", num_levels)
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} and dim={dim}")
        self.dim = dim
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.query_weight = nn.Parameter(torch.empty(num_levels, dim, dim))
        self.key_value_weight = nn.Parameter(torch.empty(num_levels, dim, 2 * dim))
        self.output_weight = nn.Parameter(torch.empty(num_levels, dim, dim))
        self.output_bias = nn.Parameter(torch.empty(num_levels, dim))
        hidden = max(1, dim // 2)
        self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, num_levels))
        self.dropout = Dropout(dropout)
        self.register_buffer("prior", torch.linspace(1.0, 0.2, num_levels), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts every projection as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.dim)
        for weight in (self.query_weight, self.key_value_weight, self.output_weight):
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.output_bias)
        for layer in self.gate:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, levels: Tensor, hashed: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes the hash sequence by level.

        Args:
            levels: ``[B, T, L, D]``, one vector per level.
            hashed: ``[B, T, D]``.

        Returns:
            The mixed sequence ``[B, T, D]``, and the gates ``[B, T, L]``, which sum to 1 over the levels.
        """
        if hashed.dim() != 3 or hashed.shape[-1] != self.dim:
            raise ValueError(f"hashed must have shape [B, T, {self.dim}], got {list(hashed.shape)}")
        batch, length, _ = hashed.shape
        if levels.shape != (batch, length, self.num_levels, self.dim):
            expected = [batch, length, self.num_levels, self.dim]
            raise ValueError(f"levels must have shape {expected} to go with hashed, got {list(levels.shape)}")

        gates = torch.softmax(self.gate(hashed) + self.prior, dim=-1)  # [B, T, L]

        # The levels are further heads of one attention, which reads and writes [B, T, L * D] in place.
        query = torch.einsum("btld,lde->btle", levels, self.query_weight).flatten(2)
        weight = self.key_value_weight.unflatten(2, (2, -1)).permute(1, 2, 0, 3)  # [D, 2, L, D]
        key, value = (hashed @ weight.flatten(1)).chunk(2, dim=-1)
        answers = causal_attention(query, key, value, self.num_levels * self.num_heads)

        # Weighing before the output projection turns L projections and their sum into one product.
        weighed = answers.unflatten(2, (self.num_levels, -1)) * gates.unsqueeze(-1)
        mixed = weighed.flatten(2) @ self.output_weight.flatten(0, 1) + gates @ self.output_bias
        return self.dropout(mixed), gates

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_levels={self.num_levels}, num_heads={self.num_heads}"

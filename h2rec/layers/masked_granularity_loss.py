"""User-level alignment of a sequence with itself when levels of its semantic IDs are masked."""

import math

import torch
from torch import Tensor, nn

from h2rec import ops
from h2rec.ops._checks import check_option


class MaskedGranularityLoss(nn.Module):
    """Keeps a user's vector where it is when the levels that the gate weighs least are masked.

    `mix` sums the levels of a sequence by the gate's weights, once as they are and once with those levels
    replaced by learned vectors, one per level. The caller encodes the masked and the full sequences to user
    vectors U and V, and `forward` pulls them together over the batch::

        S = softmax(temperature (U U' + V V') / 2)            soft targets, by rows
        loss = (CE(U V' / temperature, S) + CE(V U' / temperature, S)) / 2

    with raw dot products and gradients through the targets. With ``contrast="hard"`` a user's only positive is
    that user: `h2rec.ops.alignment_loss` of U and V, whose logits are cosines / temperature, in memory that
    grows with the batch and not with its square. The authors' code takes the transposed matrix
    of targets for the second direction, whose rows do not sum to 1; U U' + V V' is symmetric, so S serves
    both directions.

    Source: arXiv 2512.10388, dual-level alignment (masked sequence granularity loss).

    Args:
        dim: size D of the vectors.
        num_levels: number L >= 2 of levels.
        mask_ratio: share of the levels that are masked, rounded down, at least one and never all.
        temperature: as above; above 0.
        contrast: ``"soft"`` or ``"hard"``.

    Raises:
        ValueError: a parameter out of its range, or shapes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_levels: int,
        *,
        mask_ratio: float = 0.5,
        temperature: float = 1.0,
        contrast: str = "soft",
    ) -> None:
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2 (one level leaves nothing), got {num_levels}")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {mask_ratio}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        check_option("contrast", contrast, ("soft", "hard"))
        self.dim = dim
        self.num_levels = num_levels
        self.num_masked = max(1, int(num_levels * mask_ratio))
        self.temperature = temperature
        self.contrast = contrast
        self.mask_vectors = nn.Parameter(torch.empty(num_levels, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mask_vectors, std=0.02)

    def mix(self, levels: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Sums the levels by their weights, with the least weighed ones of each sequence masked and as they are.

        Args:
            levels: ``[B, T, L, D]``
            gates: ``[B, L]``, the weight of each level in each sequence.

        Returns:
            The masked and the full sequences, ``[B, T, D]`` each.
        """
        if levels.dim() != 4 or levels.shape[2:] != (self.num_levels, self.dim):
            expected = f"[B, T, {self.num_levels}, {self.dim}]"
            raise ValueError(f"levels must have shape {expected}, got {list(levels.shape)}")
        if gates.shape != (levels.shape[0], self.num_levels):
            expected = [levels.shape[0], self.num_levels]
            raise ValueError(f"gates must have shape {expected} to go with levels, got {list(gates.shape)}")
        least = gates.topk(self.num_masked, dim=-1, largest=False).indices
        masked_gates = torch.zeros_like(gates).scatter(-1, least, gates.gather(-1, least))  # [B, L]
        weights = torch.stack((gates - masked_gates, gates), dim=1)  # [B, 2, L]
        kept, full = (weights.unsqueeze(1) @ levels).unbind(2)  # [B, T, D]
        return kept + (masked_gates @ self.mask_vectors).unsqueeze(1), full

    def forward(self, masked_users: Tensor, full_users: Tensor) -> Tensor:
        """``[B, D]``, ``[B, D]`` -> scalar"""
        if masked_users.dim() != 2 or masked_users.shape != full_users.shape:
            raise ValueError(
                "masked_users and full_users must have the same shape [B, D], "
                f"got {list(masked_users.shape)} and {list(full_users.shape)}"
            )
        if self.contrast == "hard":
            return ops.alignment_loss(masked_users, full_users, temperature=self.temperature)
        # Raw dot products of normalised vectors reach D: 16-bit logits would be off by whole units.
        with torch.autocast(masked_users.device.type, enabled=False):
            dtype = torch.promote_types(masked_users.dtype, torch.float32)
            u, v = masked_users.to(dtype), full_users.to(dtype)
            targets = torch.softmax((u @ u.t() + v @ v.t()) * (self.temperature / 2), dim=-1)
            logits = (u @ v.t()) / self.temperature  # [B, B]
            log_probs = logits.log_softmax(dim=1) + logits.t().log_softmax(dim=1)
            return -(targets * log_probs).sum(dim=1).mean() / 2

    def extra_repr(self) -> str:
        levels = f"num_levels={self.num_levels}, num_masked={self.num_masked}"
        return f"dim={self.dim}, {levels}, contrast={self.contrast!r}"

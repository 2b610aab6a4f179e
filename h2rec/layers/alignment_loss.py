"""Item-level alignment of hash and semantic embeddings."""

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from h2rec import ops


class AlignmentLoss(nn.Module):
    """Code-guided contrastive loss between the two embeddings of the same items, in both directions.

    Positives of an item are itself, items with the same id or with enough equal codes (weight 1), and the
    pairs given (their weight); all other items of the batch are negatives. The formula stands at
    `h2rec.ops.alignment_loss`.

    Source: arXiv 2512.10388, dual-level alignment (code-guided alignment loss).

    Args:
        temperature: divides the cosine similarities; above 0.
        learn_temperature: makes it a parameter, learned through its logarithm so that it stays positive.
        min_shared_codes: two items are positives if their codes agree in at least this many positions.
            None: codes play no part.
        group: process group whose ranks' batches are concatenated; None: this process's batch.

    Raises:
        ValueError: a temperature that is not above 0, or ``min_shared_codes`` below 1.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learn_temperature: bool = False,
        min_shared_codes: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        if min_shared_codes is not None and min_shared_codes < 1:
            raise ValueError(f"min_shared_codes must be at least 1 or None, got {min_shared_codes}")
        self.min_shared_codes = min_shared_codes
        self.group = group
        self._temperature = float(temperature)
        self.log_temperature = (
            nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        )

    @property
    def temperature(self) -> float | Tensor:
        """A number, or a 0-dim tensor with a gradient if it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        hash_emb: Tensor,
        semantic_emb: Tensor,
        *,
        item_ids: Tensor | None = None,
        codes: Tensor | None = None,
        pair_index: Tensor | None = None,
        pair_weight: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            hash_emb, semantic_emb: ``[B, D]``, row i of both for the same item.
            item_ids: ``[B]``; rows with the same id are positives.
            codes: ``[B, L]``; needed if ``min_shared_codes`` is set.
            pair_index: ``[2, P]`` positions in the batch.
            pair_weight: ``[P]`` in (0, 1].

        Returns:
            A scalar.
        """
        return ops.alignment_loss(
            hash_emb,
            semantic_emb,
            item_ids=item_ids,
            codes=codes if self.min_shared_codes is not None else None,
            min_shared_codes=self.min_shared_codes,
            pair_index=pair_index,
            pair_weight=pair_weight,
            temperature=self.temperature,
            group=self.group,
        )

    def extra_repr(self) -> str:
        temperature = float(self.temperature)
        return f"temperature={temperature:.4g}, min_shared_codes={self.min_shared_codes}"

"""Item-level alignment of hash and semantic embeddings."""

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from h2rec import ops


class AlignmentLoss(nn.Module):
    """Code-guided contrastive loss between the two embeddings of the same items, in both directions.

    Positives of an item are itself, items with the same id, with enough equal codes or with a long enough
    common prefix (weight 1), and the pairs given (their weight); all other items of the batch are negatives.
    The formula stands at `h2rec.ops.alignment_loss`.

    Source: arXiv 2512.10388, dual-level alignment (code-guided alignment loss).

    Args:
        temperature: divides the cosine similarities; above 0.
        learn_temperature: makes it a parameter, learned through its logarithm so that it stays positive.
        min_shared_codes: two items are positives if their codes agree in at least this many positions.
        min_shared_prefix: or if their codes agree in the first so many positions. At most one of the two is
            given; None: codes play no part.
        group: process group whose ranks' batches are concatenated; None: this process's batch.

    Raises:
        ValueError: a temperature that is not above 0, ``min_shared_codes`` or ``min_shared_prefix`` below 1 or
            both given.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learn_temperature: bool = False,
        min_shared_codes: int | None = None,
        min_shared_prefix: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        given = {"min_shared_codes": min_shared_codes, "min_shared_prefix": min_shared_prefix}
        for name, least in given.items():
            if least is not None and least < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {least}")
        if None not in given.values():
            raise ValueError(f"min_shared_codes and min_shared_prefix exclude each other, got {given}")
        self.min_shared_codes = min_shared_codes
        self.min_shared_prefix = min_shared_prefix
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
            codes: ``[B, L]``; needed if ``min_shared_codes`` or ``min_shared_prefix`` is set.
            pair_index: ``[2, P]`` positions in the batch.
            pair_weight: ``[P]`` in (0, 1].

        Returns:
            A scalar.
        """
        codes, min_shared_codes = self._agreement(codes)
        return ops.alignment_loss(
            hash_emb,
            semantic_emb,
            item_ids=item_ids,
            codes=codes,
            min_shared_codes=min_shared_codes,
            pair_index=pair_index,
            pair_weight=pair_weight,
            temperature=self.temperature,
            group=self.group,
        )

    def _agreement(self, codes: Tensor | None) -> tuple[Tensor | None, int | None]:
        """Which codes are compared, and how many must be equal."""
        prefix = self.min_shared_prefix
        if prefix is None:
            return codes if self.min_shared_codes is not None else None, self.min_shared_codes
        if codes is None or codes.shape[-1] < prefix:
            came = "none" if codes is None else list(codes.shape)
            raise ValueError(
                f"codes must have shape [B, L], L at least min_shared_prefix = {prefix}, got {came}"
            )
        return codes[..., :prefix], prefix

    def extra_repr(self) -> str:
        shown = f"temperature={float(self.temperature):.4g}"
        if self.min_shared_prefix is not None:
            return f"{shown}, min_shared_prefix={self.min_shared_prefix}"
        return f"{shown}, min_shared_codes={self.min_shared_codes}"

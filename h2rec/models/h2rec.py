"""H2Rec: two branches over hash and semantic IDs, aligned for items and for users."""

import torch
from torch import Tensor, nn

from h2rec.layers import (
    AlignmentLoss,
    GranularityCrossAttention,
    GranularityFusion,
    HarmonizedEmbedding,
    MaskedGranularityLoss,
)
from h2rec.models.backbones import CausalAttention, PositionedInput, make_backbone, vectors_at
from h2rec.models.base import Batch, CoOccurrence, SequentialModel, scale_tables
from h2rec.ops._checks import check_option, check_size
from h2rec.semantic_ids import SemanticIds

MIXINGS = ("sum", "attention", "residual_attention")


class H2Rec(SequentialModel):
    """Dual-branch recommender: <[u_hash; u_sid], [e_hash(item); e_sid(item)]>.

    Each branch has a backbone of its own and meets the other's IDs before it, in one of three ways (``mixing``):

    - ``"sum"``: both backbones read e_hash + e_sid, the sum of an item's vectors.
    - ``"attention"``, the paper's: each level of the semantic IDs attends to the hash sequence, a gate per position
      mixes the levels (`GranularityCrossAttention`), then a backbone gives u_hash. The hash sequence attends to the
      fused levels (`GranularityFusion`), then a backbone gives u_sid.
    - ``"residual_attention"``: the same, each branch's own sequence added to the output of its attention.

    What can bring the two together in training:

    - ``losses["alignment"]``: `AlignmentLoss` between the hash and semantic vectors of the batch's distinct
      target items.
    - ``losses["granularity"]``: `MaskedGranularityLoss` between the user vectors of the last position with
      and without the levels that the gate weighs least; both sequences are mixed with the last position's
      gate and go through the semantic branch's backbone. Only attention has that gate.

    Source: arXiv 2512.10388. The paper's values, as its authors ran it, where they differ from the defaults:
    ``mixing="attention", share_backbone=True, fusion="mean", alignment_weight=0.1, min_shared_codes=num_levels,
    granularity_weight=0.1, max_length=200`` and co-occurrence pairs in the alignment.
    The defaults are what ranked best on validation users, see ``docs/results.md``.

    Args:
        sids: semantic IDs of the catalog.
        dim: size D of the vectors; users and items have 2 D.
        backbone: ``"sasrec"``, ``"gru4rec"`` or ``"bert4rec"``, see `h2rec.models.backbones`.
        num_layers, num_heads, dropout: of the backbones; heads and dropout also of the cross attentions.
        max_length: longest sequence.
        fusion: how the levels make e_sid: ``"sum"``, ``"mean"`` or ``"adaptive"``.
        mixing: ``"sum"``, ``"attention"`` or ``"residual_attention"``, see above.
        share_backbone: one backbone for both branches.
        alignment_weight, alignment_temperature: of the alignment; weight 0 leaves it out.
        min_shared_codes: items are positives of each other if so many of their codes agree. None: all levels
            but one (of a single level, that one).
        max_aligned_items: a batch with more distinct targets is aligned on a random subset of this size,
            because the loss is quadratic in it.
        granularity_weight: of the masked granularity loss; 0, or a single level, leaves it out. Must be 0 with
            ``mixing="sum"``.
        sparse: sparse gradients for the hash table, for `h2rec.optim.RowwiseAdagrad` or `torch.optim.SparseAdam`.

    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(
        self,
        sids: SemanticIds,
        *,
        dim: int = 64,
        backbone: str = "sasrec",
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.2,
        fusion: str = "sum",
        mixing: str = "sum",
        share_backbone: bool = False,
        alignment_weight: float = 0.0,
        alignment_temperature: float = 0.5,
        min_shared_codes: int | None = None,
        max_aligned_items: int = 1024,
        granularity_weight: float = 0.0,
        sparse: bool = False,
    ) -> None:
        super().__init__(sids.num_items, max_length)
        num_levels = sids.num_levels
        for name, weight in (
            ("alignment_weight", alignment_weight),
            ("granularity_weight", granularity_weight),
        ):
            if not weight >= 0:
                raise ValueError(f"{name} must be 0 or more, got {weight}")
        if min_shared_codes is not None and not 1 <= min_shared_codes <= num_levels:
            raise ValueError(f"min_shared_codes must lie in 1 .. {num_levels}, got {min_shared_codes}")
        check_size("max_aligned_items", max_aligned_items)
        check_option("mixing", mixing, MIXINGS)
        if granularity_weight > 0 and mixing == "sum":
            raise ValueError(
                f"granularity_weight must be 0 with mixing='sum', which has no gate, got {granularity_weight}"
            )
        self.mixing = mixing
        self.alignment_weight = alignment_weight
        self.granularity_weight = granularity_weight
        self.max_aligned_items = max_aligned_items

        # Where nobody asks for the levels one by one, the lookup adds them up.
        fuse = GranularityFusion(dim, num_levels, fusion)
        is_pooled = mixing == "sum" and fusion != "adaptive"
        self.fusion = nn.Identity() if is_pooled else fuse
        pooling = fusion if is_pooled else "levels"
        self.embedding = HarmonizedEmbedding(
            sids, dim, fusion="none", pooling=pooling, padding_idx=sids.num_items, sparse=sparse
        )
        self.input = PositionedInput(dim, max_length, dropout)
        if mixing != "sum":
            self.hash_attention = GranularityCrossAttention(
                dim, num_levels, num_heads=num_heads, dropout=dropout
            )
            self.semantic_attention = CausalAttention(dim, num_heads)
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "dropout": dropout}
        self.hash_backbone = make_backbone(backbone, dim, **sizes)
        self.semantic_backbone = (
            self.hash_backbone if share_backbone else make_backbone(backbone, dim, **sizes)
        )
        self.alignment = None
        if alignment_weight > 0:
            shared = max(1, num_levels - 1) if min_shared_codes is None else min_shared_codes
            self.alignment = AlignmentLoss(alignment_temperature, min_shared_codes=shared)
        self.masked_granularity = None
        if granularity_weight > 0 and num_levels > 1:
            self.masked_granularity = MaskedGranularityLoss(dim, num_levels)
        scale_tables(self.embedding)

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        self._check_sequences(item_ids, lengths)
        users, _, _ = self._branches(*self.embedding(item_ids))
        return users

    def item_vectors(self, item_ids: Tensor | None = None) -> Tensor:
        levels, hashed = self.embedding(self._all_item_ids() if item_ids is None else item_ids)
        return torch.cat((hashed, self.fusion(levels)), dim=-1)

    def training_outputs(
        self, batch: Batch, co_occurrence: CoOccurrence | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._check_sequences(batch.item_ids, batch.lengths)
        aligned = (
            batch.targets.new_empty(0) if self.alignment is None else self._items_to_align(batch.targets)
        )

        # One lookup for the sequence and the items to align, so that the tables get one gradient.
        ids = torch.cat((batch.item_ids.flatten(), aligned))
        sequence_shape, num_positions = batch.item_ids.shape, batch.item_ids.numel()
        levels, hashed = self.embedding(ids)
        sequence_levels, aligned_levels = levels.tensor_split((num_positions,))
        sequence_hashed, aligned_hashed = hashed.tensor_split((num_positions,))

        users, level_input, gates = self._branches(
            sequence_levels.unflatten(0, sequence_shape), sequence_hashed.unflatten(0, sequence_shape)
        )
        losses = {}
        if self.alignment is not None and len(aligned):
            loss = self._align(aligned, aligned_hashed, aligned_levels, co_occurrence)
            losses["alignment"] = self.alignment_weight * loss
        if self.masked_granularity is not None:
            loss = self._masked_granularity(level_input, gates, batch.lengths)
            losses["granularity"] = self.granularity_weight * loss
        return users, losses

    def _branches(self, levels: Tensor, hashed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Levels [B, T, L, D], or [B, T, D] where the lookup adds them up, and hash vectors [B, T, D] ->
        users [B, T, 2 D], and of attention: inputs [B, T, L, D] and gates [B, T, L]."""
        level_input, gates = None, None
        semantic = self.fusion(levels)
        if self.mixing == "sum":
            both = hashed + semantic
            hash_sequence, semantic_sequence = self.input(both), self.input(both)
        else:
            hash_input, level_input, semantic_input = map(self.input, (hashed, levels, semantic))
            hash_sequence, gates = self.hash_attention(level_input, hash_input)
            semantic_sequence = self.semantic_attention(hash_input, semantic_input)
            if self.mixing == "residual_attention":
                hash_sequence = hash_sequence + hash_input
                semantic_sequence = semantic_sequence + semantic_input
        users = torch.cat(
            (self.hash_backbone(hash_sequence), self.semantic_backbone(semantic_sequence)), dim=-1
        )
        return users, level_input, gates

    def _items_to_align(self, targets: Tensor) -> Tensor:
        items = targets[targets != self.padding_idx].unique()
        if len(items) > self.max_aligned_items:
            items = items[torch.randperm(len(items), device=items.device)[: self.max_aligned_items]]
        return items

    def _align(
        self, items: Tensor, hashed: Tensor, levels: Tensor, co_occurrence: CoOccurrence | None
    ) -> Tensor:
        pair_index, pair_weight = None, None
        if co_occurrence is not None:
            pair_index, pair_weight = co_occurrence.pairs_in_batch(items)
        return self.alignment(
            hashed,
            self.fusion(levels),
            codes=self.embedding.codes[items],
            pair_index=pair_index,
            pair_weight=pair_weight,
        )

    def _masked_granularity(self, level_input: Tensor, gates: Tensor, lengths: Tensor) -> Tensor:
        last = (lengths - 1).clamp(min=0)
        gate = vectors_at(gates, last)  # [B, L]
        mixed = torch.cat(self.masked_granularity.mix(level_input, gate))  # [2 B, T, D]
        masked_users, full_users = self.semantic_backbone.at(last.repeat(2), mixed).chunk(2)
        return self.masked_granularity(masked_users, full_users)

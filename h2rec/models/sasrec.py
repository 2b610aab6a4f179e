"""SASRec over any item embedding: the baselines that H2Rec is compared with."""

from torch import Tensor, nn

from h2rec.models.backbones import PositionedInput, SASRecBackbone
from h2rec.models.base import SequentialModel, scale_tables


class SASRec(SequentialModel):
    """Self-attention over the item vectors of the sequence; items are scored by the same vectors.

    With `HashEmbedding` it is the classic model, with `SemanticEmbedding` or `HarmonizedEmbedding` the
    baselines on semantic IDs and on both. The embedding's tables are rescaled to a root mean square of
    0.02 (`h2rec.models.base.scale_tables`).

    Source: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.

    Args:
        embedding: maps item ids to one vector each; its ``padding_idx`` must be its ``num_embeddings``.
        num_layers, num_heads, dropout: of the backbone; dropout also applies to its input.
        max_length: longest sequence.

    Raises:
        ValueError: the embedding pads with another id, or does not return one vector of its ``embedding_dim`` per
            item; a size is out of range.
    """

    def __init__(
        self,
        embedding: nn.Module,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(embedding.num_embeddings, max_length)
        if embedding.padding_idx != self.padding_idx:
            raise ValueError(
                f"embedding.padding_idx must be num_embeddings={self.padding_idx}, got {embedding.padding_idx}"
            )
        for option in ("fusion", "pooling"):
            if getattr(embedding, option, None) in ("none", "levels", "concat"):
                raise ValueError(
                    "embedding must return one vector of its embedding_dim per item, "
                    f"got {option}={getattr(embedding, option)!r}"
                )
        dim = embedding.embedding_dim
        self.embedding = embedding
        self.input = PositionedInput(dim, max_length, dropout)
        self.backbone = SASRecBackbone(dim, num_layers=num_layers, num_heads=num_heads, dropout=dropout)
        scale_tables(embedding)

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        self._check_sequences(item_ids, lengths)
        return self.backbone(self.input(self.embedding(item_ids)))

    def item_vectors(self, item_ids: Tensor | None = None) -> Tensor:
        return self.embedding(self._all_item_ids() if item_ids is None else item_ids)

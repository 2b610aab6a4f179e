"""One backbone over any item embedding: the baselines that H2Rec is compared with."""

from torch import Tensor, nn

from h2rec.models.backbones import PositionedInput, make_backbone
from h2rec.models.base import SequentialModel, scale_tables


class SingleBranch(SequentialModel):
    """A backbone over the item vectors of the sequence; items are scored by the same vectors.

    With `HashEmbedding` and the default backbone it is SASRec, with `SemanticEmbedding` or
    `HarmonizedEmbedding` the baselines on semantic IDs and on both. The embedding's tables are rescaled to a
    root mean square of 0.02 (`h2rec.models.base.scale_tables`).

    Args:
        embedding: maps item ids to one vector each; its ``padding_idx`` must be its ``num_embeddings``.
        backbone: ``"sasrec"``, ``"gru4rec"`` or ``"bert4rec"``, see `h2rec.models.backbones`.
        num_layers, num_heads, dropout: of the backbone; dropout also applies to its input.
        max_length: longest sequence.

    Raises:
        ValueError: the embedding pads with another id, or does not return one vector per item; an unknown
            backbone; a size is out of range.
    """

    def __init__(
        self,
        embedding: nn.Module,
        *,
        backbone: str = "sasrec",
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
        fusion, pooling = (getattr(embedding, option, None) for option in ("fusion", "pooling"))
        if fusion == "none" or pooling in ("levels", "concat"):
            raise ValueError(
                f"embedding must return one vector per item, got fusion={fusion!r}, pooling={pooling!r}"
            )
        dim = embedding.embedding_dim * (2 if fusion == "concat" else 1)
        self.embedding = embedding
        self.input = PositionedInput(dim, max_length, dropout)
        self.backbone = make_backbone(
            backbone, dim, num_layers=num_layers, num_heads=num_heads, dropout=dropout
        )
        scale_tables(embedding)

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        self._check_sequences(item_ids, lengths)
        return self.backbone(self.input(self.embedding(item_ids)))

    def item_vectors(self, item_ids: Tensor | None = None) -> Tensor:
        return self.embedding(self._all_item_ids() if item_ids is None else item_ids)

"""Semantic IDs: an item is a pool of its codewords."""

import torch
from torch import Tensor, nn

from h2rec import ops
from h2rec.layers._tables import (
    all_vectors,
    as_levels,
    check_padding_idx,
    check_sids,
    make_codebooks,
    make_table,
)
from h2rec.ops import Hashing
from h2rec.ops._checks import check_option, check_size
from h2rec.semantic_ids import SemanticIds


class SemanticEmbedding(nn.Module):
    """Takes ``nn.Embedding``'s place; items with codes in common share parameters.

    Args:
        sids: the catalog's semantic IDs; their codebooks are the start where they have the dimension
            ``embedding_dim``, else codewords are drawn from N(0, 1 / L).
        embedding_dim: size D of a codeword.
        pooling: of an item's L codewords: ``"sum"``, ``"mean"``, ``"levels"`` (``[*, L, D]``), ``"concat"``
            (``[*, L * D]``); or ``"prefix"``: the tuples (code_0 .. code_l) are hashed into one table, whose L rows
            are summed.
        num_buckets, sparse: rows of that table, and whether its gradient is sparse; for ``"prefix"`` only.
        padding_idx: as in :class:`h2rec.layers.HashEmbedding`.

    Input ``[*]`` integer in [0, sids.num_items); output ``[*, D]`` unless the pooling says otherwise.

    Raises:
        ValueError: a size or an option is wrong; in forward, ids out of range.
        TypeError: no `SemanticIds`.
    """

    def __init__(
        self,
        sids: SemanticIds,
        embedding_dim: int,
        *,
        pooling: str = "sum",
        num_buckets: int | None = None,
        padding_idx: int | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_sids(sids)
        check_size("embedding_dim", embedding_dim)
        check_option("pooling", pooling, ("sum", "mean", "levels", "concat", "prefix"))
        if (num_buckets is not None) != (pooling == "prefix"):
            raise ValueError(
                f"num_buckets must be given with pooling='prefix' and only then, got {num_buckets} and {pooling!r}"
            )
        if sparse and pooling != "prefix":
            raise ValueError(
                f"sparse must be False except with pooling='prefix', got {sparse} and {pooling!r}"
            )
        self.num_embeddings = sids.num_items
        self.embedding_dim = embedding_dim
        self.padding_idx = check_padding_idx(padding_idx, sids.num_items)
        self.pooling = pooling
        self.register_buffer("codes", sids.codes.to(torch.get_default_device(), copy=True))
        if pooling == "prefix":
            check_size("num_buckets", num_buckets)
            self.register_buffer("hash_constants", Hashing.prefix(sids.num_levels).constants)
            self.table = make_table(num_buckets, embedding_dim, sids.num_levels, sparse)
        else:
            self.codebooks = make_codebooks(sids, embedding_dim)

    @property
    def hash_table(self) -> Tensor:
        """The table ``[R, D]`` of ``pooling="prefix"``, a parameter."""
        return self.table.weight

    @property
    def weight(self) -> Tensor:
        """The vectors of all ids ``[num_embeddings, *]``, computed anew each time."""
        return all_vectors(self)

    def forward(self, item_ids: Tensor) -> Tensor:
        if self.pooling == "prefix":
            hashing = Hashing("prefix", self.hash_constants)
            _, hashed = ops.harmonized_embedding(
                item_ids,
                self.codes,
                None,
                self.table.weight,
                hashing=hashing,
                padding_idx=self.padding_idx,
                sparse=self.table.sparse,
            )
            return hashed
        semantic, _ = ops.harmonized_embedding(
            item_ids,
            self.codes,
            as_levels(self.codebooks),
            None,
            pooling=self.pooling,
            padding_idx=self.padding_idx,
        )
        return semantic

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, levels={self.codes.shape[1]}, "
            f"pooling={self.pooling!r}, padding_idx={self.padding_idx}"
        )

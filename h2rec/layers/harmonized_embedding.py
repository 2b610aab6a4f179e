"""Semantic and hash IDs of an item, looked up in one pass."""

import torch
from torch import Tensor, nn

from h2rec import ops
from h2rec.layers._tables import (
    all_vectors,
    as_levels,
    check_padding_idx,
    check_sids,
    make_codebooks,
    make_hashing,
    make_table,
    start_from_content,
)
from h2rec.ops import Hashing
from h2rec.ops._checks import check_option, check_size
from h2rec.semantic_ids import SemanticIds


class HarmonizedEmbedding(nn.Module):
    """Takes ``nn.Embedding``'s place with both kinds of ID.

    Args:
        sids: the catalog's semantic IDs, see :class:`h2rec.layers.SemanticEmbedding`.
        embedding_dim: size D of codewords and of hash rows.
        fusion: of the two halves: ``"sum"``, ``"mean"``, ``"concat"`` (``[*, 2 D]``), ``"gate"`` (each element a
            learned mixture of the two), or ``"none"``, which returns the pair (semantic, hashed).
        pooling: of the codewords; ``"levels"`` and ``"concat"`` need ``fusion="none"``.
        mode, num_buckets, num_hashes: of the hash table, see :class:`h2rec.layers.HashEmbedding`.
        padding_idx, sparse: likewise.

    Input ``[*]`` integer in [0, sids.num_items); output ``[*, D]`` unless fusion says otherwise.

    Raises:
        ValueError: a size or an option is wrong; in forward, ids out of range.
        TypeError: no `SemanticIds`.
    """

    def __init__(
        self,
        sids: SemanticIds,
        embedding_dim: int,
        *,
        fusion: str = "sum",
        pooling: str = "sum",
        mode: str = "direct",
        num_buckets: int | None = None,
        num_hashes: int = 2,
        padding_idx: int | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_sids(sids)
        check_size("embedding_dim", embedding_dim)
        check_option("fusion", fusion, ("sum", "mean", "concat", "gate", "none"))
        check_option("pooling", pooling, ("sum", "mean", "levels", "concat"))
        if pooling in ("levels", "concat") and fusion != "none":
            raise ValueError(f"fusion must be 'none' with pooling={pooling!r}, got {fusion!r}")
        hashing, num_rows, rows_per_item = make_hashing(mode, sids.num_items, num_buckets, num_hashes)
        self.num_embeddings = sids.num_items
        self.embedding_dim = embedding_dim
        self.padding_idx = check_padding_idx(padding_idx, sids.num_items)
        self.fusion = fusion
        self.pooling = pooling
        self.mode = mode
        self._divisor, self._num_items = hashing.divisor, hashing.num_items
        self.register_buffer("codes", sids.codes.to(torch.get_default_device(), copy=True))
        self.register_buffer("hash_constants", hashing.constants)
        self.codebooks = make_codebooks(sids, embedding_dim)
        self.table = make_table(num_rows, embedding_dim, rows_per_item, sparse)
        self.gate = nn.Linear(2 * embedding_dim, embedding_dim) if fusion == "gate" else None

    @property
    def hash_table(self) -> Tensor:
        """The table ``[R, D]``, a parameter."""
        return self.table.weight

    @property
    def weight(self) -> Tensor:
        """The vectors of all ids ``[num_embeddings, *]``, computed anew each time; absent with ``fusion="none"``."""
        if self.fusion == "none":  # an id has two vectors
            raise AttributeError("weight")
        return all_vectors(self)

    @property
    def hashing(self) -> Hashing:
        return Hashing(self.mode, self.hash_constants, self._divisor, self._num_items)

    def forward(self, item_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = ops.harmonized_embedding(
            item_ids,
            self.codes,
            as_levels(self.codebooks),
            self.hash_table,
            hashing=self.hashing,
            pooling=self.pooling,
            padding_idx=self.padding_idx,
            sparse=self.table.sparse,
            combine=self.fusion if self.fusion in ("sum", "mean", "concat") else None,
        )
        if self.gate is None:
            return output
        semantic, hashed = output
        weight = self.gate(torch.cat(output, dim=-1)).sigmoid()
        return torch.lerp(semantic, hashed, weight.to(semantic.dtype))

    @torch.no_grad()
    def initialize_hash_table(self, vectors: Tensor) -> None:
        """As :meth:`h2rec.layers.HashEmbedding.initialize_hash_table`."""
        start_from_content(self.hash_table, vectors, self.mode)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, levels={self.codes.shape[1]}, fusion={self.fusion!r}, "
            f"pooling={self.pooling!r}, mode={self.mode!r}, padding_idx={self.padding_idx}, sparse={self.table.sparse}"
        )

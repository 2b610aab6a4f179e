"""Hash IDs: rows of a table that items own, or share by hashing."""

import torch
from torch import Tensor, nn

from h2rec import ops
from h2rec.layers._tables import (
    all_vectors,
    check_padding_idx,
    make_hashing,
    make_table,
    start_from_content,
)
from h2rec.ops import Hashing
from h2rec.ops._checks import check_size


class HashEmbedding(nn.Module):
    """Takes ``nn.Embedding``'s place, with a table that may be smaller than the catalog.

    Args:
        num_embeddings: ids lie in [0, num_embeddings).
        embedding_dim: size D of a row.
        num_buckets: rows R of the table. ``"direct"``: num_embeddings. ``"multi"``: any. ``"qr"``:
            ``m + ceil(num_embeddings / m)`` for some m; None takes the least.
        mode: ``"direct"``, each id its own row; ``"multi"``, the sum of ``num_hashes`` hashed rows; ``"qr"``, the sum
            of a remainder's and a quotient's row, unique for each id (see :class:`h2rec.ops.Hashing`).
        num_hashes: hash functions of ``"multi"``.
        padding_idx: this id gives zeros and gets no gradient; negative counts from the end, and num_embeddings
            itself is a legal marker, without a row.
        sparse: the weight's gradient is sparse, for ``torch.optim.SparseAdam``.

    The table starts from N(0, 1), the sum of k rows too. Input ``[*]`` integer; output ``[*, D]``.

    Raises:
        ValueError: a size or an option is wrong; in forward, ids out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_buckets: int | None = None,
        mode: str = "direct",
        num_hashes: int = 2,
        padding_idx: int | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_size("num_embeddings", num_embeddings)
        check_size("embedding_dim", embedding_dim)
        hashing, num_rows, self.rows_per_item = make_hashing(mode, num_embeddings, num_buckets, num_hashes)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = check_padding_idx(padding_idx, num_embeddings)
        self.mode = mode
        self._divisor, self._num_items = hashing.divisor, hashing.num_items
        self.register_buffer("hash_constants", hashing.constants)
        self.table = make_table(num_rows, embedding_dim, self.rows_per_item, sparse)
        if mode == "direct" and self.padding_idx is not None and self.padding_idx < num_rows:
            with torch.no_grad():
                self.hash_table[self.padding_idx] = 0

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        *,
        padding_idx: int | None = None,
        sparse: bool = False,
    ) -> "HashEmbedding":
        """As in ``nn.Embedding``: the table is ``embeddings [num_embeddings, D]`` itself, in mode ``"direct"``.

        Raises:
            ValueError: the embeddings have not two dimensions.
        """
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must have shape [num_embeddings, D], got {list(embeddings.shape)}")
        with torch.device("meta"):
            layer = cls(*embeddings.shape, padding_idx=padding_idx, sparse=sparse)
        layer.table.weight = nn.Parameter(embeddings.detach(), requires_grad=not freeze)
        return layer

    @property
    def hash_table(self) -> Tensor:
        """The table ``[R, D]``, a parameter."""
        return self.table.weight

    @property
    def weight(self) -> Tensor:
        """The vectors of all ids ``[num_embeddings, D]``; in mode ``"direct"`` the table itself, else computed."""
        return self.hash_table if self.mode == "direct" else all_vectors(self)

    @property
    def hashing(self) -> Hashing:
        return Hashing(self.mode, self.hash_constants, self._divisor, self._num_items)

    def forward(self, item_ids: Tensor) -> Tensor:
        _, hashed = ops.harmonized_embedding(
            item_ids,
            None,
            None,
            self.hash_table,
            hashing=self.hashing,
            padding_idx=self.padding_idx,
            sparse=self.table.sparse,
        )
        return hashed

    @torch.no_grad()
    def initialize_hash_table(self, vectors: Tensor) -> None:
        """Rows start from the principal components of content vectors ``[num_embeddings, D0]``.

        Raises:
            ValueError: the mode is not ``"direct"``, or the shape does not fit.
        """
        start_from_content(self.hash_table, vectors, self.mode)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, rows={self.hash_table.shape[0]}, "
            f"padding_idx={self.padding_idx}, sparse={self.table.sparse}"
        )

"""What every sequential recommender of the library offers to training and evaluation."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from h2rec.ops._checks import check_size

TABLE_RMS = 0.02

# Numbers that are squared at a time: beside a large table there is no room for its squares.
_SUM_ELEMENTS = 2**24
# Items of a catalog that are computed at a time: on a CPU little enough to get the same memory again, on a GPU
# enough to keep it busy.
_PART_ITEMS = {"cpu": 2**14, "cuda": 2**18}


class Batch(Protocol):
    """The part of `h2rec.data.SequenceBatch` that models read."""

    item_ids: Tensor  # [B, T]
    lengths: Tensor  # [B]
    targets: Tensor  # [B, T]


class CoOccurrence(Protocol):
    """The part of `h2rec.data.CoOccurrence` that models read."""

    def pairs_in_batch(self, item_ids: Tensor) -> tuple[Tensor, Tensor]: ...


class SequentialModel(nn.Module):
    """A model with the score <user, item>: users come from sequences, item vectors stand on their own.

    Sequences are padded on the right with ``padding_idx``, which is ``num_items``. Positions count from the
    start of the sequence.

    Args:
        num_items: size of the catalog; item ids are 0 .. num_items - 1.
        max_length: longest sequence that the model takes.
    """

    def __init__(self, num_items: int, max_length: int) -> None:
        super().__init__()
        check_size("max_length", max_length)
        self.num_items = num_items
        self.max_length = max_length

    @property
    def padding_idx(self) -> int:
        """The id that fills up short sequences."""
        return self.num_items

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """User vectors at every position: ``[B, T]``, ``[B]`` -> ``[B, T, C]``.

        The vector at position t depends on items 0 .. t only. What stands at padded positions means nothing.
        """
        raise NotImplementedError

    def item_vectors(self, item_ids: Tensor | None = None) -> Tensor:
        """Vectors to score users against: ``[*]`` -> ``[*, C]``; None: the catalog, ``[num_items, C]``."""
        raise NotImplementedError

    def item_vector_parts(self) -> Iterator[Tensor]:
        """The catalog's `item_vectors` in consecutive parts ``[n, C]``, for catalogs too large to have them all."""
        device = next(self.parameters()).device
        size = _PART_ITEMS.get(device.type, 2**16)
        for start in range(0, self.num_items, size):
            stop = min(start + size, self.num_items)
            yield self.item_vectors(torch.arange(start, stop, device=device))

    def training_outputs(
        self, batch: Batch, co_occurrence: CoOccurrence | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """User vectors ``[B, T, C]``, and the weighted losses to be added to the next-item loss."""
        return self.encode(batch.item_ids, batch.lengths), {}

    def _check_sequences(self, item_ids: Tensor, lengths: Tensor) -> None:
        if item_ids.dim() != 2:
            raise ValueError(f"item_ids must have shape [B, T], got {list(item_ids.shape)}")
        if item_ids.shape[1] > self.max_length:
            raise ValueError(
                f"item_ids must hold at most max_length={self.max_length} positions, got {item_ids.shape[1]}"
            )
        if lengths.shape != item_ids.shape[:1]:
            raise ValueError(f"lengths must have shape [{item_ids.shape[0]}], got {list(lengths.shape)}")

    def _all_item_ids(self) -> Tensor:
        return torch.arange(self.num_items, device=next(self.parameters()).device)


@torch.no_grad()
def scale_tables(embedding: nn.Module) -> None:
    """Rescales an embedding's hash table and its codebooks (by one common factor) to a root mean square of 0.02.

    Item vectors are both input and output of the models: with entries of this size the first logits are
    close to 0, whatever the tables started from (random rows, codebooks, content).
    """
    for name in ("table", "codebooks"):
        tables = [table for key, table in embedding.named_parameters() if key.partition(".")[0] == name]
        if tables:
            squares = sum(
                part.square().sum() for table in tables for part in table.flatten().split(_SUM_ELEMENTS)
            )
            rms = (squares / sum(table.numel() for table in tables)).sqrt()
            for table in tables:
                table.mul_(TABLE_RMS / rms.clamp_min(1e-12))

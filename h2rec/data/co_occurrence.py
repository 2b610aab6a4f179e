"""Which items stand near each other in the training sequences."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from h2rec._files import save_safetensors
from h2rec.data.split import Split

_FORMAT = {"format": "h2rec.co_occurrence", "version": "1"}
_DTYPES = {"offsets": torch.int64, "neighbours": torch.int64, "weights": torch.float32}
_LOWEST, _MIDDLE, _HIGHEST = 0.3, 0.7, 1.0
_LOW_BITS = (1 << 16) - 1


@dataclass(frozen=True, eq=False)
class CoOccurrence:
    """Neighbours of every item as a sparse matrix (CSR), strongest first.

    Attributes:
        offsets: int64 ``[num_items + 1]``; item i has ``neighbours[offsets[i]:offsets[i + 1]]``.
        neighbours: item ids, int64 ``[n]``.
        weights: float32 ``[n]`` in [0.3, 1], scaled item by item.
    """

    offsets: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray
    _pair_offsets: np.ndarray = field(init=False, repr=False)
    _pair_neighbours: np.ndarray = field(init=False, repr=False)
    _pair_weights: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Every pair once, in the row of its lower item, with the larger of its two weights.
        owners = np.repeat(np.arange(self.num_items), np.diff(self.offsets))
        low, high = np.minimum(owners, self.neighbours), np.maximum(owners, self.neighbours)
        pairs, row = np.unique(low * self.num_items + high, return_inverse=True)
        weights = np.zeros(len(pairs), dtype=np.float32)
        np.maximum.at(weights, row, self.weights)
        low, high = np.divmod(pairs, self.num_items)
        object.__setattr__(self, "_pair_offsets", _offsets(low, self.num_items))
        object.__setattr__(self, "_pair_neighbours", high)
        object.__setattr__(self, "_pair_weights", weights)

    @property
    def num_items(self) -> int:
        return len(self.offsets) - 1

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in _DTYPES}
        save_safetensors(Path(path), tensors, _FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike) -> CoOccurrence:
        """Reads a file that :meth:`save` wrote.

        Raises:
            ValueError: it is no such file, or its content is not consistent; the message names the file.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if file.metadata() != _FORMAT:
                    raise ValueError(f"expected a file with metadata {_FORMAT}, got {file.metadata()}")
                tensors = {name: file.get_tensor(name).clone() for name in _DTYPES}
            _check_rows(**tensors)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(**{name: tensor.numpy() for name, tensor in tensors.items()})

    def pairs_in_batch(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions of a batch hold items that co-occur, as `alignment_loss` takes them.

        Args:
            item_ids: integers ``[M]``, repeats allowed; ``num_items`` (padding) pairs with nothing.

        Returns:
            ``pair_index`` int64 ``[2, P]`` and ``pair_weight`` float32 ``[P]``, on the device of
            ``item_ids``. Every unordered pair of positions is there once, in one of its two directions, with
            the larger of the weights that the items have for each other. An item that stands r times in the
            batch is paired at all r positions.
        """
        if item_ids.ndim != 1 or item_ids.is_floating_point():
            raise ValueError(f"item_ids: expected integers [M], got {item_ids.dtype} {list(item_ids.shape)}")
        ids = item_ids.detach().cpu().numpy().astype(np.int64, copy=False)
        if len(ids) and not 0 <= ids.min() <= ids.max() <= self.num_items:
            raise ValueError(
                f"item_ids: expected ids in [0, {self.num_items}], got {ids.min()} to {ids.max()}"
            )

        positions = np.argsort(ids, kind="stable")
        distinct, first, counts = np.unique(ids[positions], return_index=True, return_counts=True)
        real = distinct < self.num_items
        distinct, first, counts = distinct[real], first[real], counts[real]

        starts = self._pair_offsets[distinct]
        a, entry = _expand(self._pair_offsets[distinct + 1] - starts)
        entry += starts[a]
        neighbours = self._pair_neighbours[entry]
        # Most are not in the batch, which their low bits say without a table as long as the catalog.
        has_bits = np.zeros(_LOW_BITS + 1, dtype=bool)
        has_bits[distinct & _LOW_BITS] = True
        maybe = has_bits[neighbours & _LOW_BITS]
        a, entry, neighbours = a[maybe], entry[maybe], neighbours[maybe]
        known = np.append(distinct, self.num_items)  # which is nobody's neighbour
        b = np.searchsorted(known, neighbours)
        here = known[b] == neighbours
        a, b, weights = a[here], b[here], self._pair_weights[entry[here]]

        pair, nth = _expand(counts[a] * counts[b])
        a, b = a[pair], b[pair]
        row, column = np.divmod(nth, counts[b])
        index = np.stack([positions[first[a] + row], positions[first[b] + column]])
        return torch.from_numpy(index).to(item_ids.device), torch.from_numpy(weights[pair]).to(
            item_ids.device
        )


def _check_rows(offsets: Tensor, neighbours: Tensor, weights: Tensor) -> None:
    for name, tensor in (("offsets", offsets), ("neighbours", neighbours), ("weights", weights)):
        if tensor.dim() != 1 or tensor.dtype != _DTYPES[name]:
            raise ValueError(f"{name} must be {_DTYPES[name]} [n], got {tensor.dtype} {list(tensor.shape)}")
    size = len(neighbours)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != size or (offsets.diff() < 0).any():
        raise ValueError(f"offsets must ascend from 0 to the number of neighbours, {size}")
    if ((neighbours < 0) | (neighbours >= len(offsets) - 1)).any():
        raise ValueError(f"neighbours must lie in [0, {len(offsets) - 1})")
    if weights.shape != neighbours.shape or not ((weights > 0) & (weights <= 1)).all():
        raise ValueError(f"weights must be {size} numbers in (0, 1]")


def co_occurrence(
    split: Split,
    *,
    window: int = 3,
    min_count: int = 2,
    max_per_item: int = 50,
    weight: str = "ppmi",
    discount: float = 0.0,
) -> CoOccurrence:
    """Mine items at distance 1 to ``window`` in a training sequence (arXiv 2512.10388, item-level alignment).

    Nothing held out is counted. Both directions of a pair count alike, and an item is never its own
    neighbour.

    Args:
        window: the largest distance that counts.
        min_count: a pair must have been seen so often.
        max_per_item: keep the strongest so many neighbours of each item, ties to the lower id.
        weight: ``"ppmi"``: log(c_ij * C / (c_i * c_j)) with c_ij the pair's count, c_i its sum over j and C
            the sum of all; pairs without a positive value are dropped. ``"decay"``: the sum of 1 / distance.
            The kept weights of an item are then mapped linearly to [0.3, 1]; where they are all equal, to
            0.7.
        discount: popular neighbours count for less: before that, the weight of neighbour j is divided by
            c_j to this power.

    Raises:
        ValueError: an option out of range.
    """
    for name, value in (("window", window), ("min_count", min_count), ("max_per_item", max_per_item)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if weight not in ("ppmi", "decay"):
        raise ValueError(f"weight: expected 'ppmi' or 'decay', got {weight!r}")
    if not 0 <= discount < np.inf:
        raise ValueError(f"discount: expected a number of at least 0, got {discount}")
    try:
        from h2rec._catalog import co_occurrence as find
    except ImportError:
        find = _co_occurrence_with_numpy
    offsets, neighbours, strengths = find(
        np.ascontiguousarray(split.train_items, dtype=np.int64),
        np.ascontiguousarray(split.train_offsets, dtype=np.int64),
        split.num_items,
        window,
        min_count,
        max_per_item,
        weight == "ppmi",
        discount,
    )
    owners = np.repeat(np.arange(split.num_items), np.diff(offsets))
    return CoOccurrence(offsets, neighbours, _scaled(offsets, owners, strengths))


def _co_occurrence_with_numpy(
    items: np.ndarray,
    offsets: np.ndarray,
    num_items: int,
    window: int,
    min_count: int,
    max_per_item: int,
    is_ppmi: bool,
    discount: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high, counts, decayed = _count_pairs(items, offsets, num_items, window)
    # Each unordered pair stands for two ordered ones: C = 2 * sum(counts).
    marginal = np.bincount(low, counts, num_items) + np.bincount(high, counts, num_items)
    strength = decayed
    if is_ppmi:
        strength = np.log(counts * 2.0 * counts.sum() / (marginal[low] * marginal[high]))
    keep = (counts >= min_count) & (strength > 0)
    owners = np.concatenate([low[keep], high[keep]])
    neighbours = np.concatenate([high[keep], low[keep]])
    strength = np.concatenate([strength[keep]] * 2) / marginal[neighbours] ** discount

    order = np.lexsort((neighbours, -strength, owners))
    owners, neighbours, strength = owners[order], neighbours[order], strength[order]
    rank = np.arange(len(owners)) - _offsets(owners, num_items)[owners]
    top = rank < max_per_item
    return _offsets(owners[top], num_items), neighbours[top], strength[top]


def _count_pairs(
    items: np.ndarray, offsets: np.ndarray, num_items: int, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unordered pairs low < high ``[Q]`` with their counts and sums of 1 / distance."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    keys = []
    for distance in range(1, window + 1):
        a, b = items[:-distance], items[distance:]
        a, b = (side[(users[:-distance] == users[distance:]) & (a != b)] for side in (a, b))
        pair = np.minimum(a, b) * num_items + np.maximum(a, b)
        keys.append(pair * window + distance - 1)  # the distance rides along: one plain sort is enough
    keys = np.sort(np.concatenate(keys))
    pair, distance = np.divmod(keys, window)
    pairs, first, counts = np.unique(pair, return_index=True, return_counts=True)
    decayed = np.add.reduceat(1.0 / (distance + 1), first) if len(first) else np.empty(0)
    decayed = decayed.round(9)  # six thirds and four halves are the same strength
    low, high = np.divmod(pairs, num_items)
    return low, high, counts, decayed


def _scaled(offsets: np.ndarray, owners: np.ndarray, strength: np.ndarray) -> np.ndarray:
    # Rows are sorted, strongest first.
    highest, lowest = strength[offsets[owners]], strength[offsets[owners + 1] - 1]
    spread = highest - lowest
    differ = spread > 1e-8 * highest  # and not by rounding alone
    part = (strength - lowest) / np.where(differ, spread, 1.0)
    return np.where(differ, _LOWEST + (_HIGHEST - _LOWEST) * part, _MIDDLE).astype(np.float32)


def _offsets(owners: np.ndarray, num_items: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_items))])


def _expand(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rows of these lengths laid end to end: the row of each entry, and its place in that row."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return rows, np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows]

"""Sequence batches for training and evaluation, padded on the right with ``num_items``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from h2rec.data.negatives import UnseenItems
from h2rec.data.split import Split

_WINDOW = 20  # batches; measured on Yelp: 1.2 cells per item, without windows 6.6
_WINDOWS_PER_EPOCH = 4  # at least, or a small log would give the same batches in every epoch


class SequenceBatch(NamedTuple):
    """A batch of user sequences; everything is int64.

    Attributes:
        user_ids: ``[B]``.
        item_ids: ``[B, T]``, oldest first, ``num_items`` after the end.
        lengths: ``[B]``, at least 1.
        targets: training: the next item at each position ``[B, T]``, ``num_items`` after the end;
            evaluation: the held-out item ``[B]``.
        negatives: ``[B, T, n]`` with ``num_items`` after the end, or None.
    """

    user_ids: Tensor
    item_ids: Tensor
    lengths: Tensor
    targets: Tensor
    negatives: Tensor | None = None


class TrainBatches(IterableDataset[SequenceBatch]):
    """One epoch of training batches per iteration; pass it to a ``DataLoader`` with ``batch_size=None``, or iterate.

    Users are shuffled by ``(seed, epoch)``. Within windows of up to 20 batches they are then sorted by length, and
    the batches shuffled again, so that a batch holds sequences of similar length and T, the longest of the
    batch, stays small. A batch depends on nothing but the arguments, the epoch and its number.

    Ranks get different users, similar lengths and the same number of batches of the same size. Where the
    users do not divide by the ranks, the epoch leaves out the last few of the shuffle (fewer than
    ``world_size``).

    Args:
        split: users with fewer than two training items are left out.
        batch_size: sequences per batch and rank; the last one of an epoch may be smaller.
        max_length: the longest input; of a longer sequence the latest ``max_length + 1`` items are used.
        num_negatives: so many for each position: uniform over the items that are not among the user's training
            items (held-out items can be drawn, as any unseen item).

    Raises:
        ValueError: an argument out of range, no user to train on, or negatives asked for and a user who has
            had every item.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        max_length: int,
        num_negatives: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sizes(batch_size, max_length, rank, world_size)
        if num_negatives < 0:
            raise ValueError(f"num_negatives: expected 0 or more, got {num_negatives}")
        self.split = split
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_negatives = num_negatives
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._lengths = np.minimum(np.diff(split.train_offsets) - 1, max_length)  # [U], of the input
        self._users = np.flatnonzero(self._lengths >= 1)
        self._per_rank = len(self._users) // world_size
        if self._per_rank == 0:
            raise ValueError(
                f"split: expected at least {world_size} users (one per rank) with two training items, "
                f"got {len(self._users)}"
            )
        self._unseen = None
        if num_negatives:
            self._unseen = UnseenItems(split.train_offsets, split.train_items, split.num_items)
            nothing_left = self._users[self._unseen.counts[self._users] == 0]
            if len(nothing_left):
                raise ValueError(
                    f"split: no negatives can be drawn for {len(nothing_left)} users who have had all "
                    f"{split.num_items} items, the first of them user {split.log.users[int(nothing_left[0])]!r}"
                )

    def __len__(self) -> int:
        return -(-self._per_rank // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[SequenceBatch]:
        epoch = self._epoch
        batches = self._batches_of_users(epoch)
        for number in _numbers_of_worker(len(batches)):
            yield self._batch(batches[number], epoch, number)

    def _batches_of_users(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        users = rng.permutation(self._users)[: self._per_rank * self.world_size]
        step = self.batch_size * self.world_size
        batches_per_window = max(1, min(_WINDOW, len(self) // _WINDOWS_PER_EPOCH))
        window = np.arange(len(users)) // (step * batches_per_window)
        users = users[np.lexsort((self._lengths[users], window))]
        chunks = [users[start : start + step] for start in range(0, len(users), step)]
        return [chunks[i][self.rank :: self.world_size] for i in rng.permutation(len(chunks))]

    def _batch(self, users: np.ndarray, epoch: int, number: int) -> SequenceBatch:
        lengths = self._lengths[users]
        ends = self.split.train_offsets[users + 1]
        item_ids, is_item = _gather(self.split.train_items, ends - 1 - lengths, lengths, self.split.num_items)
        targets, _ = _gather(self.split.train_items, ends - lengths, lengths, self.split.num_items)
        negatives = None
        if self._unseen is not None:
            rng = np.random.default_rng([self.seed, epoch, self.rank, number])
            negatives = self._negatives(users, is_item, rng)
        return _to_torch(users, item_ids, lengths, targets, negatives)

    def _negatives(self, users: np.ndarray, is_item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        owners = np.repeat(users, is_item.sum(axis=1))
        negatives = np.full((*is_item.shape, self.num_negatives), self.split.num_items, dtype=np.int64)
        negatives[is_item] = self._unseen.draw(owners, self.num_negatives, rng)
        return negatives


class EvalBatches(IterableDataset[SequenceBatch]):
    """Every user that has a held-out item, once over all ranks, by ascending length.

    The input is what came before the target: for ``"valid"`` the training items, for ``"test"`` the
    validation item too. ``targets`` is ``[B]``. A rank may have one batch more than another.

    Args:
        split: users without a held-out item are left out.
        stage: ``"valid"`` or ``"test"``.
        batch_size: sequences per batch and rank; the last one may be smaller.
        max_length: of a longer sequence the latest ``max_length`` items are used.
        users: those with a held-out item that come, ``[n]``; None: all.

    Raises:
        ValueError: an unknown stage, an argument out of range.
    """

    def __init__(
        self,
        split: Split,
        stage: str,
        *,
        batch_size: int,
        max_length: int,
        users: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_sizes(batch_size, max_length, rank, world_size)
        self.split = split
        self.stage = stage
        self.batch_size = batch_size
        self._targets = split.targets(stage)
        self._ends = split.log.offsets[1:] - (1 if stage == "test" else 2)
        self._lengths = np.minimum(self._ends - split.log.offsets[:-1], max_length)
        users = np.flatnonzero(self._targets >= 0) if users is None else users
        self._users = users[np.argsort(self._lengths[users], kind="stable")][rank::world_size]

    def __len__(self) -> int:
        return -(-len(self._users) // self.batch_size)

    def __iter__(self) -> Iterator[SequenceBatch]:
        for number in _numbers_of_worker(len(self)):
            users = self._users[number * self.batch_size : (number + 1) * self.batch_size]
            lengths = self._lengths[users]
            item_ids, _ = _gather(
                self.split.log.items, self._ends[users] - lengths, lengths, self.split.num_items
            )
            yield _to_torch(users, item_ids, lengths, self._targets[users], None)


def _gather(
    flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """``flat[start : start + length]`` as padded rows ``[B, T]``, and where they hold items, bool ``[B, T]``."""
    steps = np.arange(lengths.max())
    is_item = steps < lengths[:, None]
    rows = np.full(is_item.shape, padding, dtype=np.int64)
    rows[is_item] = flat[(starts[:, None] + steps)[is_item]]
    return rows, is_item


def _to_torch(*arrays: np.ndarray | None) -> SequenceBatch:
    return SequenceBatch(*(None if array is None else torch.from_numpy(array) for array in arrays))


def _numbers_of_worker(num_batches: int) -> range:
    # DataLoader asks its workers in turn, so strided numbers come out in order.
    worker = get_worker_info()
    return range(num_batches) if worker is None else range(worker.id, num_batches, worker.num_workers)


def _check_sizes(batch_size: int, max_length: int, rank: int, world_size: int) -> None:
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected a number in [0, {world_size}), got {rank}")

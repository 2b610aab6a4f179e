"""Leave-one-out: the last item of every user for the test, the one before for validation; or nothing held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from h2rec.data.interactions import InteractionLog

_HELD_OUT = 2  # the validation and the test item


@dataclass(frozen=True, eq=False)
class Split:
    """What each part may see. All that learns or counts takes ``train_items``; nothing held out is in it.

    Attributes:
        log: the whole log.
        train_offsets: int64 ``[U + 1]``; user u trains on ``train_items[train_offsets[u]:train_offsets[u +
            1]]``.
        train_items: item ids, oldest first, int64 ``[E']``.
        valid_targets, test_targets: the held-out item of each user, int64 ``[U]``, -1 where there is none.
        short_users: how many users have fewer than three interactions; all of theirs are for training.
    """

    log: InteractionLog
    train_offsets: np.ndarray
    train_items: np.ndarray
    valid_targets: np.ndarray
    test_targets: np.ndarray
    short_users: int

    @property
    def num_users(self) -> int:
        return self.log.num_users

    @property
    def num_items(self) -> int:
        return self.log.num_items

    def targets(self, stage: str) -> np.ndarray:
        """Held-out items of ``"valid"`` or ``"test"``: int64 ``[U]``, -1 where there is none."""
        if stage == "valid":
            return self.valid_targets
        if stage == "test":
            return self.test_targets
        raise ValueError(f"stage: expected 'valid' or 'test', got {stage!r}")

    def sample_users(self, count: int, seed: int) -> np.ndarray | None:
        """Some of the users with held-out items, ascending int64 ``[count]``; None if there are no more than that."""
        users = np.flatnonzero(self.test_targets >= 0)
        if len(users) <= count:
            return None
        return np.sort(np.random.default_rng([seed, 2]).choice(users, count, replace=False))

    def train_history(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each of some users trains on, laid end to end: its row among ``users``, and the item, int64 ``[n]``."""
        starts = self.train_offsets[users]
        return runs(self.train_items, starts, self.train_offsets[users + 1] - starts)

    def train_counts(self) -> np.ndarray:
        """How often each item stands in the training sequences: int64 ``[num_items]``."""
        return np.bincount(self.train_items, minlength=self.num_items).astype(np.int64, copy=False)


def leave_one_out(log: InteractionLog) -> Split:
    """Hold out the last two items of every user that has three or more."""
    lengths = np.diff(log.offsets)  # [U]
    has_targets = lengths > _HELD_OUT
    ends = log.offsets[1:]
    train_lengths = np.where(has_targets, lengths - _HELD_OUT, lengths)

    is_train = np.ones(log.num_interactions, dtype=bool)
    valid_targets = np.full(log.num_users, -1, dtype=np.int64)
    test_targets = valid_targets.copy()
    for targets, position in ((valid_targets, ends[has_targets] - 2), (test_targets, ends[has_targets] - 1)):
        targets[has_targets] = log.items[position]
        is_train[position] = False

    return Split(
        log=log,
        train_offsets=np.concatenate([[0], np.cumsum(train_lengths)]),
        train_items=log.items[is_train],
        valid_targets=valid_targets,
        test_targets=test_targets,
        short_users=int((~has_targets).sum()),
    )


def nothing_held_out(log: InteractionLog) -> Split:
    """All interactions are for training, as for a model that is served."""
    no_targets = np.full(log.num_users, -1, dtype=np.int64)
    return Split(
        log=log,
        train_offsets=log.offsets,
        train_items=log.items,
        valid_targets=no_targets,
        test_targets=no_targets,
        short_users=int((np.diff(log.offsets) <= _HELD_OUT).sum()),
    )


def runs(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``flat[start : start + length]`` of each run, laid end to end: the run's number, and the value, ``[n]``."""
    numbers = np.repeat(np.arange(len(starts)), lengths)
    steps = np.arange(len(numbers)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return numbers, flat[np.repeat(starts, lengths) + steps]

"""How well held-out items are ranked: overall, for head and tail, and by band of training popularity.

The rules are fixed: a rank counts half of the ties; the full ranking is over the whole catalog without what the user
had before (but never without the held-out item), unless asked otherwise; sampled negatives are drawn once per seed,
outside the user's whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from h2rec.data import (
    POPULARITY_BANDS,
    EvalBatches,
    SequenceBatch,
    Split,
    popularity_band,
    popularity_head,
    sample_negatives,
)
from h2rec.data.split import runs
from h2rec.models import SequentialModel
from h2rec.models.backbones import vectors_at
from h2rec.training.config import is_large
from h2rec.training.tiled_ranks import ranks_among, ranks_in_catalog

CUTOFFS = (5, 10, 20)

_BATCH_SIZE = 512
# Scores held at a time: a tile that stays in cache is faster on a CPU; a GPU wants few launches.
_TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


class Ranks(NamedTuple):
    """Where each user's held-out item came, by ascending user.

    Attributes:
        users, targets: int64 ``[n]``, users with a held-out item and that item.
        full: float64 ``[n]``, its rank in the whole catalog, 1 for the best.
        sampled: float64 ``[n]``, its rank among itself and the sampled negatives, or None.
    """

    users: np.ndarray
    targets: np.ndarray
    full: np.ndarray
    sampled: np.ndarray | None = None


class CatalogScores:
    """Scores of users against the whole catalog, such that items with equal vectors get equal scores.

    A matrix product may round equal columns differently, and then items with the same semantic ID would be ranked by
    their place in the catalog. So each distinct vector is scored once.

    Args:
        items: ``[N, C]``.

    Raises:
        FloatingPointError: a vector is not finite.
    """

    def __init__(self, items: Tensor) -> None:
        if not items.isfinite().all():
            raise FloatingPointError("the model's item vectors are not finite")
        distinct, inverse = torch.unique(items, dim=0, return_inverse=True)
        repeats = len(distinct) < len(items)
        self.num_items = len(items)
        self._vectors = distinct if repeats else items
        self._row = inverse if repeats else None

    @property
    def tile(self) -> int:
        """How many users to score at a time."""
        return max(1, _TILE_ELEMENTS.get(self._vectors.device.type, 2**24) // self.num_items)

    def __call__(self, users: Tensor) -> Tensor:
        """``[B, C] -> [B, N]``"""
        scores = users @ self._vectors.T
        return scores if self._row is None else scores[:, self._row]


def ranks_of_targets(scores: Tensor, target_scores: Tensor) -> Tensor:
    """Rank of a target among candidates that include it: 1 + those above + half of its ties.

    Args:
        scores: ``[B, N]``, the target's own among them; overwritten.
        target_scores: ``[B, 1]``.

    Returns:
        float64 ``[B]``.
    """
    # above - below; and above + below + ties + the target itself = N.
    difference = scores.sub_(target_scores).sign_().sum(1, dtype=torch.float64)
    return (scores.shape[1] + 1 + difference) / 2


class Ranker:
    """Ranks the held-out items of a stage, batch by batch, on the device that the model is on.

    In a large catalog (`h2rec.training.config.LARGE_CATALOG`) the vectors of the users wait for one sweep over the
    items, see `h2rec.training.tiled_ranks`.

    Args:
        model: in eval mode.
        stage: ``"valid"`` or ``"test"``.
        negatives: item ids for the sampled ranking, from `h2rec.data.sample_negatives` for the same users.
        mask_history: leave what the user had before out of the full ranking (but never the target).
        users: those who are ranked, ascending ``[n]``; None: all that have a held-out item.
        progress: see `h2rec.training.tiled_ranks.ranks_in_catalog`.

    Raises:
        FloatingPointError: an item vector is not finite.
    """

    def __init__(
        self,
        model: SequentialModel,
        split: Split,
        stage: str,
        *,
        negatives: np.ndarray | None = None,
        mask_history: bool = True,
        users: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.split = split
        self.stage = stage
        self.negatives = negatives
        self.mask_history = mask_history
        self.users = users
        self.progress = progress
        self.scores = None if is_large(model.num_items) else CatalogScores(model.item_vectors())
        self._waiting: list[tuple[np.ndarray, Tensor, Tensor]] = []
        device = next(model.parameters()).device
        # Full and sampled rank of each user; 0 where there is none, so that processes can add theirs up.
        self._ranks = torch.zeros(2, split.num_users, dtype=torch.float64, device=device)

    def add(self, batch: SequenceBatch) -> None:
        """Ranks the targets of a batch of `EvalBatches`, a tile of users at a time.

        Raises:
            FloatingPointError: a target's score is not finite.
        """
        user_ids = batch.user_ids.cpu().numpy()
        item_ids, lengths, targets = (
            part.to(self._ranks.device) for part in (batch.item_ids, batch.lengths, batch.targets)
        )
        users = vectors_at(self.model.encode(item_ids, lengths), lengths - 1)  # [B, C]
        if self.scores is None:
            self._add_waiting(user_ids, users, targets)
            return
        for start in range(0, len(users), self.scores.tile):
            tile = slice(start, start + self.scores.tile)
            self._add_tile(user_ids[tile], users[tile], targets[tile, None])

    def _add_tile(self, user_ids: np.ndarray, users: Tensor, targets: Tensor) -> None:
        scores = self.scores(users)  # [tile, N]
        target_scores = scores.gather(1, targets)
        self._check_finite(target_scores)
        if self.negatives is not None:
            candidates = torch.cat([target_scores, scores.gather(1, self._negatives_of(user_ids))], dim=1)
            self._ranks[1, user_ids] = ranks_of_targets(candidates, target_scores)
        if self.mask_history:
            scores[_history(self.split, self.stage, user_ids)] = -torch.inf
            scores.scatter_(1, targets, target_scores)
        self._ranks[0, user_ids] = ranks_of_targets(scores, target_scores)

    def _add_waiting(self, user_ids: np.ndarray, users: Tensor, targets: Tensor) -> None:
        vectors = self.model.item_vectors(targets)
        self._check_finite((users * vectors).sum(1))
        if self.negatives is not None:
            negatives = self.model.item_vectors(self._negatives_of(user_ids))  # [B, n, C]
            self._ranks[1, user_ids] = ranks_among(users, vectors, negatives)
        self._waiting.append((user_ids, users, targets))

    def _negatives_of(self, user_ids: np.ndarray) -> Tensor:
        rows = user_ids if self.users is None else np.searchsorted(self.users, user_ids)
        return torch.from_numpy(self.negatives[rows]).to(self._ranks.device)

    def _check_finite(self, target_scores: Tensor) -> None:
        if not target_scores.isfinite().all():
            raise FloatingPointError(f"the model's {self.stage} scores are not finite")

    def _rank_waiting(self) -> None:
        batches, self._waiting = self._waiting, []
        user_ids = np.concatenate([ids for ids, _, _ in batches])
        hidden = _history(self.split, self.stage, user_ids) if self.mask_history else None
        users, targets = (torch.cat(part) for part in list(zip(*batches, strict=True))[1:])
        self._ranks[0, user_ids] = ranks_in_catalog(
            self.model, users, targets, hidden=hidden, progress=self.progress
        )

    def ranks(self, world_size: int = 1) -> Ranks:
        """The ranks of all users; with several processes each must ask, and gets what all have ranked."""
        if self._waiting:
            self._rank_waiting()
        if world_size > 1:
            torch.distributed.all_reduce(self._ranks)
        targets = self.split.targets(self.stage)
        users = np.flatnonzero(targets >= 0) if self.users is None else self.users
        full, sampled = self._ranks.cpu().numpy()[:, users]
        return Ranks(users, targets[users], full, None if self.negatives is None else sampled)


def eval_batches(
    split: Split,
    stage: str,
    model: SequentialModel,
    *,
    users: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> EvalBatches:
    """The users that this process ranks."""
    return EvalBatches(
        split,
        stage,
        batch_size=_BATCH_SIZE,
        max_length=model.max_length,
        users=users,
        rank=rank,
        world_size=world_size,
    )


@torch.no_grad()
def rank_users(
    model: SequentialModel,
    split: Split,
    stage: str,
    *,
    negatives: np.ndarray | None = None,
    mask_history: bool = True,
    users: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Ranks:
    """Ranks every user's held-out item; see `Ranker`. Leaves the model in the mode that it is in."""
    was_training = model.training
    model.eval()
    ranker = Ranker(
        model,
        split,
        stage,
        negatives=negatives,
        mask_history=mask_history,
        users=users,
        progress=progress,
    )
    for batch in eval_batches(split, stage, model, users=users, rank=rank, world_size=world_size):
        ranker.add(batch)
    ranks = ranker.ranks(world_size)
    model.train(was_training)
    return ranks


def _history(split: Split, stage: str, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row among these users, item) of everything that came before the held-out item."""
    starts = split.log.offsets[users]
    lengths = split.log.offsets[users + 1] - (1 if stage == "test" else 2) - starts
    return runs(split.log.items, starts, lengths)


def repeated_share(split: Split, stage: str, users: np.ndarray | None = None) -> float:
    """The share of users whose held-out item is one that they had before.

    Args:
        users: with held-out items, ``[n]``; None: all that have one.
    """
    targets = split.targets(stage)
    users = np.flatnonzero(targets >= 0) if users is None else users
    rows, items = _history(split, stage, users)
    return len(np.unique(rows[items == targets[users[rows]]])) / len(users)


def hits_and_gains(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """``HR@k`` (0 or 1) and ``NDCG@k`` (1 / log2(1 + rank) where it is a hit) of each rank, ``[n]``."""
    values = {}
    for cutoff in CUTOFFS:
        hit = ranks <= cutoff
        values[f"HR@{cutoff}"] = hit.astype(np.float64)
        values[f"NDCG@{cutoff}"] = np.where(hit, 1 / np.log2(1 + ranks), 0.0)
    return values


def metrics_by_group(ranks: np.ndarray, targets: np.ndarray, train_counts: np.ndarray) -> dict[str, Any]:
    """Mean metrics over all users, and over those whose target is in the head, the tail, or a popularity band.

    Args:
        ranks: float64 ``[n]``.
        targets: int64 ``[n]``, the items that the ranks are of.
        train_counts: int64 ``[num_items]``.

    Returns:
        ``{"overall": group, "head": group, "tail": group, "bands": {"0": group, "1-9": group, ...}}``; a group is
        ``{"HR@5": ..., "NDCG@5": ..., ..., "count": users}``, with None for the metrics of no users.
    """
    values = hits_and_gains(ranks)

    def group(members: np.ndarray) -> dict[str, float | int | None]:
        count = int(members.sum())
        means = {name: float(value[members].mean()) if count else None for name, value in values.items()}
        return {**means, "count": count}

    is_head = popularity_head(train_counts)[targets]
    band = popularity_band(train_counts)[targets]
    return {
        "overall": group(np.ones(len(ranks), dtype=bool)),
        "head": group(is_head),
        "tail": group(~is_head),
        "bands": {name: group(band == index) for index, (name, _, _) in enumerate(POPULARITY_BANDS)},
    }


def metrics_of(ranks: Ranks, train_counts: np.ndarray) -> dict[str, Any]:
    """``{"full": metrics, "sampled": metrics}`` as in `metrics_by_group`; no ``"sampled"`` without such ranks."""
    metrics = {"full": metrics_by_group(ranks.full, ranks.targets, train_counts)}
    if ranks.sampled is not None:
        metrics["sampled"] = metrics_by_group(ranks.sampled, ranks.targets, train_counts)
    return metrics


def evaluate_model(
    model: SequentialModel,
    split: Split,
    stage: str,
    *,
    num_negatives: int = 100,
    mask_history: bool = True,
    seed: int = 0,
    users: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The full ranking and the one against sampled negatives, on the device that the model is on.

    Args:
        stage: ``"valid"`` or ``"test"``.
        num_negatives, seed: see `h2rec.data.sample_negatives`; the same for every model.
        mask_history, users, progress: see `Ranker`.

    Returns:
        ``{"full": metrics, "sampled": metrics}`` as in `metrics_by_group`.

    Raises:
        ValueError: nobody has a held-out item; or see `h2rec.data.sample_negatives`.
    """
    if not (split.targets(stage) >= 0).any():
        raise ValueError(f"split: expected users with a held-out item for {stage}, got none")
    negatives = sample_negatives(split, stage, num_negatives, seed, users=users)
    ranks = rank_users(
        model,
        split,
        stage,
        negatives=negatives,
        mask_history=mask_history,
        users=users,
        progress=progress,
    )
    return metrics_of(ranks, split.train_counts())

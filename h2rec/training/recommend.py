"""The best next items for a user or a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from h2rec import ops
from h2rec.data import ItemCatalog
from h2rec.models import SequentialModel
from h2rec.models.backbones import vectors_at
from h2rec.training.config import TrainConfig
from h2rec.training.inputs import read_split

_BATCH_SIZE = 256


class Recommendation(NamedTuple):
    """An item: its raw id, its title where the catalog has titles, and its score."""

    item: int | str
    title: str | None
    score: float


def user_history(config: TrainConfig, catalog: ItemCatalog, user: int | str) -> np.ndarray:
    """Item ids of all that a user of the run's log, as it is now, had, oldest first: int64 ``[T]``.

    Raises:
        ValueError: no such user.
    """
    log = read_split(config, catalog.num_items, catalog).log
    row = log.index_of_user(user)
    return log.items[log.offsets[row] : log.offsets[row + 1]]


def item_history(catalog: ItemCatalog, items: Sequence[int | str]) -> np.ndarray:
    """Item ids of raw ids, oldest first: int64 ``[T]``.

    Raises:
        ValueError: no items, or items that the catalog does not have.
    """
    if len(items) == 0:
        raise ValueError("items: expected at least one item, got none")
    return catalog.index_of(items)


@torch.no_grad()
def recommend(
    model: SequentialModel,
    catalog: ItemCatalog,
    histories: Sequence[np.ndarray],
    k: int = 10,
    *,
    exclude_history: bool = True,
) -> list[list[Recommendation]]:
    """The k items that score highest after each history, best first.

    Args:
        model: in eval mode.
        catalog: the items that it was trained on.
        histories: item ids, oldest first, from `user_history` or `item_history`; the model reads the latest
            ``model.max_length`` of each.
        k: how many; fewer come where the catalog has no more.
        exclude_history: leave out what is in the history.

    Raises:
        ValueError: no histories, an empty one, or k below 1.
    """
    if not histories or any(len(history) == 0 for history in histories):
        raise ValueError("histories: expected one item or more in each, got none")
    users = user_vectors(model, histories)
    exclude = _padded(histories, -1, users.device) if exclude_history else None
    scores, items = ops.score_topk(users, model.item_vector_parts(), k, exclude=exclude)
    return [
        [
            Recommendation(catalog.ids[item], catalog.titles[item] if catalog.titles else None, score)
            for item, score in zip(user_items, user_scores, strict=True)
            if item >= 0
        ]
        for user_items, user_scores in zip(items.tolist(), scores.tolist(), strict=True)
    ]


@torch.no_grad()
def user_vectors(model: SequentialModel, histories: Sequence[np.ndarray]) -> Tensor:
    """The vectors ``[B, C]`` of users who had these items, oldest first; see `recommend`."""
    device = next(model.parameters()).device
    users = []
    for start in range(0, len(histories), _BATCH_SIZE):
        latest = [history[-model.max_length :] for history in histories[start : start + _BATCH_SIZE]]
        item_ids = _padded(latest, model.padding_idx, device)
        lengths = (item_ids != model.padding_idx).sum(1)
        users.append(vectors_at(model.encode(item_ids, lengths), lengths - 1))
    return torch.cat(users)


def _padded(rows: Sequence[np.ndarray], padding: int, device: torch.device) -> Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows],
        batch_first=True,
        padding_value=padding,
    )
    return padded.to(device)

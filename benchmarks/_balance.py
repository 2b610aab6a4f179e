"""How a model's head pays for its tail: both, while popularity is added to its scores or taken from them.

A model that gains in the head and loses in the tail may be better, or only fonder of popular items. To move along this
curve is no merit, one number does it for any model. A curve that lies further out is.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from h2rec.data import Split
from h2rec.models import SequentialModel
from h2rec.training import rank_users
from h2rec.training.evaluation import metrics_by_group

POPULARITY_WEIGHTS = (-0.5, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.5)


class WithPopularity(SequentialModel):
    """A model whose score of an item is its own plus ``weight * log(1 + n)``, n the item's training interactions.

    Any weight but 0 also breaks the ties of items with equal vectors, such as those that share a semantic ID.

    Args:
        train_counts: int64 ``[num_items]``.
    """

    def __init__(self, model: SequentialModel, train_counts: np.ndarray, weight: float) -> None:
        super().__init__(model.num_items, model.max_length)
        self.model = model
        bonus = weight * torch.from_numpy(train_counts).float().log1p()
        self.register_buffer("_bonus", bonus[:, None].to(next(model.parameters()).device))  # [N, 1]

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        return F.pad(self.model.encode(item_ids, lengths), (0, 1), value=1.0)  # [B, T, C + 1]

    def item_vectors(self, item_ids: Tensor | None = None) -> Tensor:
        bonus = self._bonus if item_ids is None else self._bonus[item_ids]
        return torch.cat((self.model.item_vectors(item_ids), bonus), dim=-1)


def balance(
    model: SequentialModel,
    split: Split,
    users: np.ndarray,
    *,
    mask_history: bool,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Test NDCG@10 of head and tail in the full ranking, with popularity in the scores.

    Args:
        model: in eval mode.
        users: who is ranked, ascending ``[n]``.
        mask_history, progress: see `h2rec.training.rank_users`.

    Returns:
        ``{"weights": ..., "head": ..., "tail": ...}``, one number for each of `POPULARITY_WEIGHTS`.
    """
    counts = split.train_counts()
    options = {"users": users, "mask_history": mask_history, "progress": progress}
    curve = {"weights": list(POPULARITY_WEIGHTS), "head": [], "tail": []}
    for weight in POPULARITY_WEIGHTS:
        ranks = rank_users(WithPopularity(model, counts, weight).eval(), split, "test", **options)
        metrics = metrics_by_group(ranks.full, ranks.targets, counts)
        for group in ("head", "tail"):
            curve[group].append(metrics[group]["NDCG@10"])
    return curve

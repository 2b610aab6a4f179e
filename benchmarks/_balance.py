"""How a model's head pays for its tail: both, while popularity is added to its scores or taken from them.

A model that gains in the head and loses in the tail may rank better, or may only be fonder of popular items. The curve
tells: what one number per model can move along it is no merit, what moves the curve is.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from h2rec.data import Split
from h2rec.models import SequentialModel
from h2rec.training.evaluation import metrics_by_group, rank_users

POPULARITY_WEIGHTS = (-0.5, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.5)


class WithPopularity(SequentialModel):
    """A model whose score of an item is its own plus ``weight * log(1 + n)``, n the item's training interactions.

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


def balance(model: SequentialModel, split: Split, users: np.ndarray) -> dict[str, list[float]]:
    """Test NDCG@10 of overall, head and tail by the full ranking, at each of `POPULARITY_WEIGHTS`.

    Args:
        users: who is ranked, ascending ``[n]``.
    """
    counts = split.train_counts()
    curve = {name: [] for name in ("overall", "head", "tail")}
    for weight in POPULARITY_WEIGHTS:
        ranks = rank_users(WithPopularity(model, counts, weight), split, "test", users=users)
        metrics = metrics_by_group(ranks.full, ranks.targets, counts)
        for name, values in curve.items():
            values.append(metrics[name]["NDCG@10"])
    return curve

"""The negatives of the sampled softmax, shared by all positions of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from h2rec.data import Split


class DrawnItems(NamedTuple):
    """Items drawn for a batch of B users.

    Attributes:
        items: int64 ``[n]``; repeats can occur.
        log_expected: fp32 ``[n]``, log of how often each is expected among n draws.
        is_own: bool ``[B, n]``, whether it is among the user's training items.
    """

    items: Tensor
    log_expected: Tensor
    is_own: Tensor


class SharedNegatives:
    """Draws half of the negatives uniformly from the catalog, the other half as often as training has them.

    Popular items compete hardest with the target. That they are drawn more often is undone by
    `h2rec.training.losses.sampled_softmax` (logQ correction). With 1024, the sum model on Amazon Beauty reaches a
    validation NDCG@10 (with the history in the ranking) of 0.0431 after eight epochs; with 1024 uniform ones 0.0407.

    Args:
        split: its training part gives the frequencies and the users' own items.
        num_negatives: n.
        device: where the items are wanted.
    """

    def __init__(self, split: Split, num_negatives: int, device: torch.device) -> None:
        self.split = split
        self.num_uniform = num_negatives - num_negatives // 2
        self.num_popular = num_negatives // 2
        share = split.train_counts() / len(split.train_items)
        expected = self.num_uniform / split.num_items + self.num_popular * share
        self._log_expected = torch.from_numpy(np.log(expected)).float().to(device)  # [N]
        self._train_items = torch.from_numpy(split.train_items).to(device)

    def draw(self, user_ids: Tensor) -> DrawnItems:
        """Draws for users ``[B]`` from the global generator of the device."""
        device = self._train_items.device
        uniform = torch.randint(self.split.num_items, (self.num_uniform,), device=device)
        places = torch.randint(len(self._train_items), (self.num_popular,), device=device)
        items = torch.cat([uniform, self._train_items[places]])
        rows, own_items = (
            torch.from_numpy(part).to(device) for part in self.split.train_history(user_ids.cpu().numpy())
        )
        return DrawnItems(
            items, self._log_expected[items], _pairs_among(rows, own_items, len(user_ids), items)
        )


def _pairs_among(rows: Tensor, items: Tensor, num_rows: int, drawn: Tensor) -> Tensor:
    """Whether (row, drawn item) is one of the pairs ``(rows[i], items[i])``: bool ``[num_rows, n]``."""
    distinct, inverse = drawn.unique(return_inverse=True)
    place = torch.searchsorted(distinct, items).clamp_(max=len(distinct) - 1)
    found = distinct[place] == items
    pairs = torch.zeros(num_rows, len(distinct), dtype=torch.bool, device=drawn.device)
    pairs[rows[found], place[found]] = True
    return pairs[:, inverse]

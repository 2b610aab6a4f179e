"""Items of the same kind as a target, for a next-item loss that is not told to tell them apart at any price."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from h2rec.ops import score_topk
from h2rec.semantic_ids import SemanticIds
from h2rec.training.losses import FULL_SOFTMAX_MAX_ITEMS

_NUM_NEAREST = 10
_GROUP_SIZE = 5


class RelatedItems:
    """Draws for an item others of its kind, uniformly.

    With content vectors these are the ten nearest items (by cosine). Without, or in a catalog too large to compare
    all pairs, the catalog is divided into groups by semantic IDs: an item belongs to the longest prefix that at
    least five items have in common, and its group (itself included) are its kind.

    Args:
        sids: semantic IDs of the catalog.
        content: ``[num_items, D0]`` content vectors, or None.
    """

    def __init__(self, sids: SemanticIds, content: Tensor | None = None) -> None:
        num_items = sids.num_items
        if content is not None and _NUM_NEAREST < num_items <= FULL_SOFTMAX_MAX_ITEMS:
            self._members = _nearest(content).flatten()
            self._sizes = torch.full((num_items,), _NUM_NEAREST)
            self._starts = torch.arange(num_items) * _NUM_NEAREST
            return
        groups = _groups(sids)  # [N]
        sizes = groups.bincount()
        starts = sizes.cumsum(0) - sizes
        self._members = groups.argsort()  # group by group
        self._sizes = sizes[groups]  # [N], of an item's kind
        self._starts = starts[groups]  # [N], of an item's kind in the members

    def to(self, device: torch.device) -> RelatedItems:
        """Moves itself to where the items are wanted."""
        for name in ("_members", "_sizes", "_starts"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(self, items: Tensor, number: int) -> Tensor:
        """So many for each item, ``[M]`` -> ``[M, number]``; repeats can occur. From the device's global generator."""
        items = items[:, None]
        places = torch.randint(2**62, (len(items), number), device=items.device) % self._sizes[items]
        return self._members[self._starts[items] + places]


def _nearest(content: Tensor) -> Tensor:
    """The nearest other items of each, int64 ``[N, 10]``."""
    directions = F.normalize(content.float(), dim=1)
    itself = torch.arange(len(directions))[:, None]
    return score_topk(directions, directions, _NUM_NEAREST, exclude=itself)[1]


def _groups(sids: SemanticIds) -> Tensor:
    """The group of each item, int64 ``[N]``, numbered from 0."""
    prefixes = torch.zeros(sids.num_items, dtype=torch.int64)
    groups, num_groups = prefixes, 1
    for level, size in enumerate(sids.codebook_sizes):
        codes = sids.codes[:, level].cpu()
        _, prefixes, counts = torch.unique(prefixes * size + codes, return_inverse=True, return_counts=True)
        groups = torch.where(counts[prefixes] >= _GROUP_SIZE, num_groups + prefixes, groups)
        num_groups += len(counts)
    return groups.unique(return_inverse=True)[1]

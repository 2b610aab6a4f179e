"""Items of the same kind as a target, for a next-item loss that is not told to tell them apart at any price."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from h2rec.data import Split
from h2rec.ops import score_topk
from h2rec.semantic_ids import SemanticIds
from h2rec.training.losses import FULL_SOFTMAX_MAX_ITEMS

_NUM_NEAREST = 10
_AUDIENCE_DIM = 64
_TILE = 256  # items whose codes are compared with all others' at a time
_GROUP_SIZE = 5


class RelatedItems:
    """Draws for an item others of its kind, uniformly, and says how much of its weight as a target they get.

    An item's kind are the ten others that are most like it in what they are and in who chose them: the cosine of
    content vectors plus the cosine of `_audiences`. By content alone, branches of a chain in cities where the user
    never is are of a kind. Without content vectors, the share of codes of the semantic IDs that two items have in
    common before the first that differs takes their place.

    In a catalog too large to compare all pairs, it is divided into groups by semantic IDs: an item belongs to the
    longest prefix that at least five items have in common, and its group (itself included) are its kind.

    Args:
        sids: semantic IDs of the catalog.
        split: its training part says who chose what.
        share: of the weight, for an item of mean popularity, in 0 .. 1. One that occurs n times in training has
            ``k / (k + n)``, as if its kind were known from k observations; k follows from the mean.
        content: ``[num_items, D0]`` content vectors, or None.
    """

    def __init__(self, sids: SemanticIds, split: Split, share: float, content: Tensor | None = None) -> None:
        num_items = sids.num_items
        counts = torch.from_numpy(split.train_counts())
        prior = share * counts.float().mean()  # k (1 - share)
        self._shares = prior / (prior + (1 - share) * counts)  # [N]
        if _NUM_NEAREST < num_items <= FULL_SOFTMAX_MAX_ITEMS:
            self._members = _nearest(sids, _audiences(split), content).flatten()
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
        for name in ("_shares", "_members", "_sizes", "_starts"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(self, items: Tensor, number: int) -> Tensor:
        """So many for each item, ``[M]`` -> ``[M, number]``; repeats can occur. From the device's global generator."""
        items = items[:, None]
        places = torch.randint(2**62, (len(items), number), device=items.device) % self._sizes[items]
        return self._members[self._starts[items] + places]

    def shares(self, items: Tensor) -> Tensor:
        """The part of each target's weight that goes to its kind, fp32 ``[M]``."""
        return self._shares[items]


def _audiences(split: Split) -> Tensor:
    """Unit vectors ``[N, D]``, alike if the same users, or users who chose the same, chose the items; 0 without users.

    They lie in the leading directions of the matrix of items and users whose entries are ``1 / sqrt(n_item n_user)``
    where the user chose the item, n the numbers of pairs. Users of a single item say nothing and are left out: with
    an item that only they chose, each would take a direction of its own, and a leading one.
    """
    shape = split.num_items, split.num_users
    users = np.repeat(np.arange(split.num_users), np.diff(split.train_offsets))
    pairs = torch.from_numpy(np.unique(split.train_items * split.num_users + users))
    items, users = pairs // split.num_users, pairs % split.num_users
    says_something = users.bincount(minlength=shape[1])[users] > 1
    items, users = items[says_something], users[says_something]
    of_items, of_users = items.bincount(minlength=shape[0]), users.bincount(minlength=shape[1])
    chosen = torch.sparse_coo_tensor(
        torch.stack((items, users)),
        (of_items[items] * of_users[users]).rsqrt(),
        shape,
        is_coalesced=True,
        check_invariants=False,
    )
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs' as well
        directions, lengths, _ = torch.svd_lowrank(chosen, q=min(_AUDIENCE_DIM + 16, *shape), niter=4)
    vectors = F.normalize((directions * lengths)[:, :_AUDIENCE_DIM], dim=1)
    return vectors.masked_fill_(of_items[:, None] == 0, 0)  # they have what rounding left


def _nearest(sids: SemanticIds, audiences: Tensor, content: Tensor | None) -> Tensor:
    """The ten others that are most like each item, int64 ``[N, 10]``."""
    items = torch.arange(len(audiences))
    if content is not None:
        vectors = torch.cat((F.normalize(content.float(), dim=1), audiences), dim=1)
        return score_topk(vectors, vectors, _NUM_NEAREST, exclude=items[:, None])[1]
    codes = sids.codes.cpu().T.contiguous()  # [L, N]
    nearest = torch.empty(len(items), _NUM_NEAREST, dtype=torch.int64)
    for tile in items.split(_TILE):
        scores = audiences[tile] @ audiences.T  # [tile, N]
        are_equal = torch.ones(scores.shape, dtype=torch.bool)
        for level in codes:
            are_equal &= level[tile, None] == level
            scores.add_(are_equal, alpha=1 / len(codes))
        scores.scatter_(1, tile[:, None], -2)
        nearest[tile] = scores.topk(_NUM_NEAREST, dim=1).indices
    return nearest


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

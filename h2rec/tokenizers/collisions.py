"""Items that share a semantic ID: moving some to another code of the last level, or telling them apart by one more."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds

_BATCH_SIZE = 16_384


@dataclass(frozen=True)
class Resolution:
    """Semantic IDs after collisions were resolved, and what that took.

    Attributes:
        sids: the new semantic IDs.
        moved: items with another code than before, ascending, ``[M]`` int64.
        old_codes, new_codes: their last codes, ``[M]`` int32.
        added_error: mean growth of the squared distance to the codewords, over the moved items.
        unresolved: items that are still too many on their tuple: no candidate had room.
    """

    sids: SemanticIds
    moved: Tensor
    old_codes: Tensor
    new_codes: Tensor
    added_error: float
    unresolved: int

    def summary(self) -> str:
        return (
            f"{len(self.moved):,} of {self.sids.num_items:,} items moved, squared distance {self.added_error:+.4g} "
            f"each; {self.unresolved:,} found no room"
        )


def resolve_collisions(
    sids: SemanticIds,
    vectors: VectorSource,
    *,
    capacity: int = 1,
    num_candidates: int = 32,
    num_published: int = 0,
) -> Resolution:
    """Moves items off crowded tuples, to the next-best code of the last level that has room.

    The items nearest to a codeword keep it. After ``append``, give the number of items that were there before as
    ``num_published``: those keep their codes and count against the capacity.

    Args:
        sids: with codebooks.
        vectors: ``[N - num_published, D]``, those of the items that may move.
        capacity: most items of one tuple.
        num_candidates: last codes that an item is offered, nearest first.

    Raises:
        ValueError: an argument is out of range, codebooks are not known, or there are not as many vectors as items.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    if not 0 <= num_published <= sids.num_items:
        raise ValueError(f"num_published must lie in [0, {sids.num_items}], got {num_published}")
    if sids.codebooks is None:
        raise ValueError("these SemanticIds have no codebooks, so items cannot be moved to other codes")
    if sids.has_counting_level:
        raise ValueError(
            "the last level of these SemanticIds numbers the items of a tuple: there are no collisions"
        )
    codes = sids.codes.clone()
    crowded = _in_large_groups(sids, capacity)
    items, candidates, distances = _candidates(sids, vectors, crowded, num_candidates, num_published)

    # room[prefix][code]: how many more items a tuple takes; only prefixes with a crowded tuple are looked at.
    prefixes, prefix_of = _prefix_numbers(codes)
    watched = np.zeros(prefixes, dtype=bool)
    watched[prefix_of[items]] = True
    room: dict[tuple[int, int], int] = defaultdict(lambda: capacity)
    last = codes[:, -1].numpy()
    # Whoever may not move, or need not, takes a place first.
    settled = np.ones(len(codes), dtype=bool)
    settled[items] = False
    for item in np.flatnonzero(settled & watched[prefix_of]).tolist():
        room[int(prefix_of[item]), int(last[item])] -= 1

    moved, old_codes, added, unresolved = [], [], [], 0
    waiting = []
    for row in np.lexsort((items, distances[:, 0])).tolist():  # the nearest first
        place = int(prefix_of[items[row]]), int(candidates[row, 0])
        if room[place] > 0:
            room[place] -= 1
        else:
            waiting.append(row)
    for row in waiting:
        item = int(items[row])
        prefix = int(prefix_of[item])
        for rank, code in enumerate(candidates[row].tolist()):
            if room[prefix, code] > 0:
                room[prefix, code] -= 1
                moved.append(item)
                old_codes.append(int(last[item]))
                added.append(float(distances[row, rank] - distances[row, 0]))
                last[item] = code  # shares memory with codes
                break
        else:
            unresolved += 1
    order = np.argsort(moved)
    moved = torch.tensor(moved, dtype=torch.int64)[order]
    provenance = sids.provenance | {"collisions": "next-best", "capacity": str(capacity)}
    return Resolution(
        sids=SemanticIds(
            codes, codebook_sizes=sids.codebook_sizes, codebooks=sids.codebooks, provenance=provenance
        ),
        moved=moved,
        old_codes=torch.tensor(old_codes, dtype=torch.int32)[order],
        new_codes=codes[moved, -1],
        added_error=float(np.mean(added)) if added else 0.0,
        unresolved=unresolved,
    )


def add_level(sids: SemanticIds) -> SemanticIds:
    """Tells items of one tuple apart by one more code: their number within it, in the order of their ids.

    The new codewords are zero, so that the sum of codewords stays what it was. ``SemanticIds.append`` goes on
    counting where the codes end, also after save and load.

    Raises:
        ValueError: the level is already there.
    """
    if sids.has_counting_level:
        raise ValueError("sids already has a level that numbers the items of a tuple")
    counts = sids.numbers_within_groups()
    size = int(counts.max()) + 1 if len(counts) else 1
    codebooks = sids.codebooks
    if codebooks is not None:
        codebooks = [*codebooks, torch.zeros(size, codebooks[0].shape[1])]
    return SemanticIds(
        torch.cat([sids.codes, counts.unsqueeze(1)], dim=1),
        codebook_sizes=[*sids.codebook_sizes, size],
        codebooks=codebooks,
        provenance=sids.provenance | {"collisions": "counting level"},
    )


def _in_large_groups(sids: SemanticIds, capacity: int) -> np.ndarray:
    order, starts = sids.groups()
    sizes = np.diff(starts)
    crowded = np.zeros(sids.num_items, dtype=bool)
    crowded[order] = np.repeat(sizes > capacity, sizes)
    return crowded


def _prefix_numbers(codes: Tensor) -> tuple[int, np.ndarray]:
    """How many prefixes of L - 1 codes there are, and that of each item."""
    if codes.shape[1] == 1:
        return 1, np.zeros(len(codes), dtype=np.int64)
    order, starts = (
        SemanticIds(codes[:, :-1]).groups() if len(codes) else (np.zeros(0, int), np.zeros(1, int))
    )
    numbers = np.empty(len(codes), dtype=np.int64)
    numbers[order] = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return len(starts) - 1, numbers


def _candidates(
    sids: SemanticIds, vectors: VectorSource, crowded: np.ndarray, num_candidates: int, num_published: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crowded items that may move ``[M]``, their nearest last codes ``[M, C]``, the current first, and distances."""
    *before, last = sids.codebooks
    count = min(num_candidates, len(last))
    items, candidates, distances = [np.zeros(0, np.int64)], [np.zeros((0, count), np.int64)], []
    distances.append(np.zeros((0, count), np.float32))
    start = num_published
    for batch in vector_batches(vectors, _BATCH_SIZE):
        stop = start + len(batch)
        chosen = torch.from_numpy(start + np.flatnonzero(crowded[start:stop]))
        residual = batch.cpu()[chosen - start]
        for level, codebook in enumerate(before):
            residual = residual - codebook[sids.codes[chosen, level].long()]
        squared = torch.cdist(residual, last).square()
        # What an item has comes first, wherever a beam or an earlier move has put it.
        current = sids.codes[chosen, -1:].long()
        ranked = squared.scatter(1, current, -1).topk(count, dim=1, largest=False).indices
        items.append(chosen.numpy())
        candidates.append(ranked.numpy())
        distances.append(squared.gather(1, ranked).numpy())
        start = stop
    if start != sids.num_items:
        raise ValueError(
            f"vectors must have {sids.num_items - num_published} rows, one for each item that may move, "
            f"got {start - num_published}"
        )
    return np.concatenate(items), np.concatenate(candidates), np.concatenate(distances)

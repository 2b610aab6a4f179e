"""Items that share a semantic ID: moving some to another code of the last level, or telling them apart by one more."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from h2rec.ops._checks import check_size
from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds

# Floats of the largest intermediate, distances [rows, K]: 16 MiB.
_BLOCK_ELEMENTS = 4 << 20


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
    check_size("capacity", capacity)
    check_size("num_candidates", num_candidates)
    if not 0 <= num_published <= sids.num_items:
        raise ValueError(f"num_published must lie in [0, {sids.num_items}], got {num_published}")
    if sids.codebooks is None:
        raise ValueError("these SemanticIds have no codebooks, so items cannot be moved to other codes")
    if sids.has_counting_level:
        raise ValueError(
            "the last level of these SemanticIds numbers the items of a tuple: there are no collisions"
        )
    crowded = _in_large_groups(sids, capacity)
    items, candidates, distances = _candidates(sids, vectors, crowded, num_candidates, num_published)
    codes = sids.codes.clone()
    last = codes[:, -1].numpy()  # shares memory with codes
    prefixes = _prefix_numbers(codes)
    # Prefix by prefix, the nearest first; who may not move, or need not, has a place already.
    order = np.lexsort((items, distances[:, 0], prefixes[items]))
    items, candidates = items[order], candidates[order]
    settled = np.ones(len(codes), dtype=bool)
    settled[items] = False
    settled = np.flatnonzero(settled)
    settled = settled[np.argsort(prefixes[settled], kind="stable")]
    choices = _place_items(
        prefixes[items],
        candidates,
        prefixes[settled],
        last[settled],
        num_codes=sids.codebook_sizes[-1],
        capacity=capacity,
    )
    rows = np.flatnonzero(choices > 0)
    rows = rows[np.argsort(items[rows])]
    moved, ranks = items[rows], choices[rows]
    old_codes = last[moved]
    last[moved] = candidates[rows, ranks]
    added = distances[order[rows], ranks] - distances[order[rows], 0]
    provenance = sids.provenance | {"collisions": "next-best", "capacity": str(capacity)}
    return Resolution(
        sids=SemanticIds(
            codes, codebook_sizes=sids.codebook_sizes, codebooks=sids.codebooks, provenance=provenance
        ),
        moved=torch.from_numpy(moved),
        old_codes=torch.from_numpy(old_codes),
        new_codes=codes[moved, -1],
        added_error=float(added.mean(dtype=np.float64)) if len(added) else 0.0,
        unresolved=int((choices < 0).sum()),
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


def _prefix_numbers(codes: Tensor) -> np.ndarray:
    """Equal for items with equal first L - 1 codes, ascending with these."""
    numbers = np.zeros(len(codes), dtype=np.int64)
    if codes.shape[1] > 1 and len(codes):
        order, starts = SemanticIds(codes[:, :-1]).groups()
        numbers[order] = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return numbers


def _candidates(
    sids: SemanticIds, vectors: VectorSource, crowded: np.ndarray, num_candidates: int, num_published: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crowded items that may move ``[M]``, their nearest last codes ``[M, C]``, the current first, and distances."""
    *before, last = sids.codebooks
    items = num_published + np.flatnonzero(crowded[num_published:])
    candidates = np.empty((len(items), min(num_candidates, len(last))), dtype=np.int32)
    distances = np.empty(candidates.shape, dtype=np.float32)
    start, done = num_published, 0
    for batch in vector_batches(vectors, max(1, _BLOCK_ELEMENTS // len(last))):
        if batch.shape[1] != last.shape[1]:
            raise ValueError(
                f"vectors must have dimension {last.shape[1]}, as the codebooks have, got {batch.shape[1]}"
            )
        rows = slice(done, int(np.searchsorted(items, start + len(batch))))
        chosen = torch.from_numpy(items[rows])
        residual = batch.cpu()[chosen - start]
        for level, codebook in enumerate(before):
            residual = residual - codebook[sids.codes[chosen, level].long()]
        squared = torch.cdist(residual, last).square()
        # What an item has comes first, wherever a beam or an earlier move has put it.
        current = sids.codes[chosen, -1:].long()
        ranked = squared.scatter(1, current, -1).topk(candidates.shape[1], dim=1, largest=False).indices
        candidates[rows] = ranked
        distances[rows] = squared.gather(1, ranked)
        start, done = start + len(batch), rows.stop
    if start != sids.num_items:
        raise ValueError(
            f"vectors must have {sids.num_items - num_published} rows, one for each item that may move, "
            f"got {start - num_published}"
        )
    return items, candidates, distances


def _place_items(
    prefixes: np.ndarray,
    candidates: np.ndarray,
    settled_prefixes: np.ndarray,
    settled_codes: np.ndarray,
    *,
    num_codes: int,
    capacity: int,
) -> np.ndarray:
    """The column of ``candidates [M, C]`` that each item gets, ``[M]`` int32; -1 where none has room.

    ``prefixes [M]`` and ``settled_prefixes [S]`` ascend; within a prefix those that choose first stand first.
    """
    try:
        from h2rec._catalog import place_items
    except ImportError:
        return _place_items_in_python(
            prefixes, candidates, settled_prefixes, settled_codes, num_codes, capacity
        )
    return place_items(prefixes, candidates, settled_prefixes, settled_codes, num_codes, capacity)


def _place_items_in_python(
    prefixes: np.ndarray,
    candidates: np.ndarray,
    settled_prefixes: np.ndarray,
    settled_codes: np.ndarray,
    num_codes: int,
    capacity: int,
) -> np.ndarray:
    choices = np.full(len(prefixes), -1, dtype=np.int32)
    firsts = np.flatnonzero(np.diff(prefixes, prepend=-1))
    for first, stop in itertools.pairwise([*firsts.tolist(), len(prefixes)]):
        start, end = np.searchsorted(settled_prefixes, [prefixes[first], prefixes[first] + 1])
        loads = np.bincount(settled_codes[start:end], minlength=num_codes)
        # First who finds room on the first candidate, then the others.
        for ranks in (range(1), range(1, candidates.shape[1])):
            for row in range(first, stop):
                for rank in ranks:
                    if choices[row] < 0 and loads[candidates[row, rank]] < capacity:
                        loads[candidates[row, rank]] += 1
                        choices[row] = rank
    return choices

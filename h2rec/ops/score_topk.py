"""The best items of each user, without a matrix of all scores."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from h2rec.ops._checks import check_dim, check_floating, check_integer, check_same_device

# Scores held at a time: on a CPU what stays in cache, on a GPU enough to keep it busy.
_TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
_QUERIES = 1024  # at most, of a tile: many more would leave it few items
_BLOCK = 32  # neighbouring items, of whose scores only the largest is looked at first


@torch.no_grad()
def score_topk(
    queries: Tensor, items: Tensor | Iterable[Tensor], k: int, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k items with the largest inner product for each query, best first; exact, without gradients.

    Items are walked in tiles and k are kept per query: beside the inputs, memory does not grow with N. Of equal scores
    the lower id comes first, and is kept. (A matrix product may round the scores of equal vectors differently.)

    Args:
        queries: ``[B, D]``, floating point.
        items: ``[N, D]`` in the dtype of the queries; or consecutive parts of it, ``[n, D]`` each, as
            `h2rec.models.SequentialModel.item_vector_parts` computes them.
        exclude: ``[B, M]`` integer item ids that a query must not get; -1 excludes nothing.

    Returns:
        ``(scores [B, k], indices [B, k] int64)``. With fewer than k items left, the rest are -inf and -1.

    Raises:
        ValueError: shapes do not fit, or k is not positive.
        TypeError: an argument is no tensor, or of a wrong dtype.
    """
    check_floating("queries", queries)
    check_dim("queries", queries, ("B", "D"))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_queries = queries.shape[0]
    if exclude is not None:
        check_integer("exclude", exclude)
        if exclude.dim() != 2 or exclude.shape[0] != num_queries:
            raise ValueError(f"exclude must have shape [{num_queries}, M], got {list(exclude.shape)}")

    best_scores = queries.new_full((num_queries, k), -torch.inf)
    best_items = queries.new_full((num_queries, k), -1, dtype=torch.int64)
    at_once = max(min(num_queries, _QUERIES), 1)
    size = max(k, _TILE_ELEMENTS.get(queries.device.type, 1 << 26) // at_once)
    # The same for all tiles: where the system has to clear pages for them, it takes longer than the products.
    memory = queries.new_empty(0)
    start = 0
    for tile in _tiles(queries, items, size):
        if len(memory) < (len(tile) + _BLOCK) * at_once:
            memory = queries.new_empty((len(tile) + _BLOCK) * at_once)
        for first in range(0, num_queries, _QUERIES):
            part = slice(first, first + _QUERIES)
            scores = _scores(tile, queries[part], memory)
            if exclude is not None:
                item = exclude[part] - start
                query, which = ((item >= 0) & (item < len(tile))).nonzero(as_tuple=True)
                scores[item[query, which], query] = -torch.inf
            _keep_best(best_scores[part], best_items[part], scores, start)
        start += len(tile)
    return best_scores, best_items


def _scores(items: Tensor, queries: Tensor, memory: Tensor) -> Tensor:
    """``[n, B]`` in that memory, with -inf from the last item to the end of its block."""
    num_items, num_queries = len(items), len(queries)
    size = -(-num_items // _BLOCK) * _BLOCK
    scores = memory[: size * num_queries].view(size, num_queries)
    torch.mm(items, queries.T, out=scores[:num_items])
    scores[num_items:] = -torch.inf
    return scores


def _keep_best(best_scores: Tensor, best_items: Tensor, scores: Tensor, start: int) -> None:
    """Updates the best ``[B, k]`` by the scores ``[n, B]`` of the items from ``start`` on."""
    k = best_scores.shape[1]
    blocks = scores.unflatten(0, (-1, _BLOCK))  # [n / _BLOCK, _BLOCK, B]
    largest = blocks.amax(1)  # [n / _BLOCK, B]
    # What is kept has lower ids, so that only a larger score takes its place. (NaN counts as larger.)
    rows = (~(largest.amax(0) <= best_scores[:, -1])).nonzero().squeeze(1)  # [R]
    if not len(rows):
        return
    # Whatever is outside of the k blocks with the largest scores has k that come before it.
    which = _best_columns(largest.T[rows], k)[1].sort(dim=1).values  # [R, up to k]
    scores, columns = _best_columns(blocks[which, :, rows[:, None]].flatten(1), k)
    found = which.gather(1, columns // _BLOCK) * _BLOCK + columns % _BLOCK + start
    found = found.masked_fill(scores == -torch.inf, -1)
    # A stable sort leaves what is kept in front of its equals.
    scores, order = torch.cat([best_scores[rows], scores], 1).sort(dim=1, descending=True, stable=True)
    best_scores[rows] = scores[:, :k]
    best_items[rows] = torch.cat([best_items[rows], found], 1).gather(1, order[:, :k])


def _tiles(queries: Tensor, items: Tensor | Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Consecutive rows of ``items``, at most ``size`` of them."""
    for part in (items,) if isinstance(items, Tensor) else items:
        check_floating("items", part)
        check_dim("items", part, ("N", "D"))
        check_same_device("items", part, "queries", queries)
        if part.dtype != queries.dtype:
            raise TypeError(f"items is {part.dtype}, but queries is {queries.dtype}")
        if queries.shape[1] != part.shape[1]:
            raise ValueError(f"items has dimension {part.shape[1]}, but queries has {queries.shape[1]}")
        if len(part):
            yield from part.split(size)


def _best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row ``[B, n]`` (all, if there are no more), of equals the lower column first."""
    if k < scores.shape[1]:
        # topk takes any of equal scores: one place more shows whether the last place had several to choose from.
        best, columns = scores.topk(k + 1, dim=1)
        last, columns = best[:, k - 1 : k], columns[:, :k]
        undecided = (last == best[:, k:]).squeeze(1).nonzero().squeeze(1)
        if len(undecided):
            columns[undecided] = _first_columns(scores[undecided], last[undecided], k)
        columns = columns.sort(dim=1).values
    else:
        columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


def _first_columns(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """Columns of what is better than ``last [B, 1]`` and, up to k in all, of the first that are equal: ``[B, k]``."""
    better, equal = ~(scores <= last), scores == last  # NaN is better, as in topk
    wanted = k - better.sum(1, keepdim=True)
    return (better | (equal & (equal.cumsum(1) <= wanted))).nonzero()[:, 1].view(-1, k)

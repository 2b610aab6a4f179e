"""The best items of each user, without a matrix of all scores."""

import torch
from torch import Tensor

from h2rec.ops._checks import check_dim, check_floating, check_integer, check_same_device

# Scores held at a time: 64 MiB in fp32.
_TILE_ELEMENTS = 16 << 20


@torch.no_grad()
def score_topk(
    queries: Tensor, items: Tensor, k: int, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k items with the largest inner product for each query, best first; exact, without gradients.

    Args:
        queries: ``[B, D]``, floating point.
        items: ``[N, D]``, floating point; walked in tiles.
        exclude: ``[B, M]`` integer item ids that a query must not get; -1 excludes nothing.

    Returns:
        ``(scores [B, k], indices [B, k] int64)``. With fewer than k items left, the rest are -inf and -1.

    Raises:
        ValueError: shapes do not fit, or k is not positive.
        TypeError: a dtype is wrong.
    """
    for name, tensor, shape in (("queries", queries, ("B", "D")), ("items", items, ("N", "D"))):
        check_floating(name, tensor)
        check_dim(name, tensor, shape)
    check_same_device("items", items, "queries", queries)
    if queries.shape[1] != items.shape[1]:
        raise ValueError(f"items has dimension {items.shape[1]}, but queries has {queries.shape[1]}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_queries = queries.shape[0]
    if exclude is not None:
        check_integer("exclude", exclude)
        if exclude.dim() != 2 or exclude.shape[0] != num_queries:
            raise ValueError(f"exclude must have shape [{num_queries}, M], got {list(exclude.shape)}")

    best_scores = queries.new_full((num_queries, k), -torch.inf)
    best_items = queries.new_full((num_queries, k), -1, dtype=torch.int64)
    tile_size = max(k, _TILE_ELEMENTS // max(num_queries, 1))
    for start in range(0, items.shape[0], tile_size):
        scores = queries @ items[start : start + tile_size].T  # [B, tile]
        if exclude is not None:
            column = exclude - start
            row, which = ((column >= 0) & (column < scores.shape[1])).nonzero(as_tuple=True)
            scores[row, column[row, which]] = -torch.inf
        scores, found = scores.topk(min(k, scores.shape[1]), dim=1)
        found = (found + start).masked_fill(scores == -torch.inf, -1)
        best_scores, order = torch.cat([best_scores, scores], 1).topk(k, dim=1)
        best_items = torch.cat([best_items, found], 1).gather(1, order)
    return best_scores, best_items

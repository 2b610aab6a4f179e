"""An approximate index of a model's items, and how much of the exact ranking it finds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from h2rec import ops
from h2rec.models import SequentialModel

if TYPE_CHECKING:
    import faiss

CUTOFF = 10
# A graph is the faster and more exact one, but is built item by item: half an hour for a million on one core.
_GRAPH_MAX_ITEMS = 200_000
_GRAPH_SEARCHED = 128  # candidates that a search keeps
_LISTS_SEARCHED = 64
_TRAINING_ITEMS_PER_LIST = 40


def check_installed() -> None:
    """Refuses where there is no faiss.

    Raises:
        ModuleNotFoundError: it says what to install.
    """
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'faiss: {error}; pip install "h2rec[faiss]"') from error


@torch.no_grad()
def build_index(model: SequentialModel) -> tuple[faiss.Index, str]:
    """An index by inner product, filled part by part, with its parameters of search; and its name for faiss's factory.

    Up to 200,000 items a graph (HNSW); beyond, sqrt(N) lists (IVF) of fp16 vectors, of which 64 are searched.
    """
    import faiss

    num_items = model.num_items
    dim = next(model.item_vector_parts()).shape[1]
    if num_items <= _GRAPH_MAX_ITEMS:
        name = "HNSW32,Flat"
        index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = _GRAPH_SEARCHED
    else:
        num_lists = math.isqrt(num_items)
        name = f"IVF{num_lists},SQfp16"
        index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = _LISTS_SEARCHED
        sample = np.random.default_rng(0).choice(
            num_items, _TRAINING_ITEMS_PER_LIST * num_lists, replace=False
        )
        index.train(model.item_vectors(torch.from_numpy(np.sort(sample))).numpy())
    for part in model.item_vector_parts():
        index.add(part.numpy())
    return index, name


@torch.no_grad()
def recall(index: faiss.Index, model: SequentialModel, users: Tensor) -> float:
    """Share of the exact 10 best items of users ``[B, C]`` that the index finds; an item that scores as much as the
    tenth is one of them.
    """
    exact, _ = ops.score_topk(users, model.item_vector_parts(), CUTOFF)
    exact = exact[:, : model.num_items]
    _, found = index.search(users.numpy(), exact.shape[1])
    parts = zip(users.split(256), torch.from_numpy(found).split(256), strict=True)
    scores = torch.cat([_scores(model, *part) for part in parts])
    slack = 1e-6 * exact.abs().amax(1, keepdim=True)  # two sums of the same products
    return ((scores >= exact[:, -1:] - slack).sum() / exact.numel()).item()


def _scores(model: SequentialModel, users: Tensor, items: Tensor) -> Tensor:
    """[B, C], [B, k], -1 for none -> [B, k]"""
    scores = torch.einsum("bc,bkc->bk", users, model.item_vectors(items.clamp(min=0)))
    return scores.masked_fill(items < 0, -torch.inf)

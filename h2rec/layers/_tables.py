"""Parameters and buffers that several embedding layers have."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from h2rec.ops import Hashing
from h2rec.semantic_ids import SemanticIds

# Rows of content that are copied at a time.
_PART_ROWS = 1 << 18


def check_sids(sids: SemanticIds) -> None:
    if not isinstance(sids, SemanticIds):
        raise TypeError(
            f"sids must be SemanticIds (SemanticIds.load reads a file), got {type(sids).__name__}"
        )


def make_codebooks(sids: SemanticIds, embedding_dim: int) -> nn.Parameter | nn.ParameterList:
    """``[L, K, D]``, or one ``[K_l, D]`` per level if the sizes differ; the SIDs' own codebooks where they fit.

    Drawn codewords have the standard deviation 1 / sqrt(L), so that the sum of L has that of ``nn.Embedding``.
    """
    if sids.codebooks is None or sids.codebooks[0].shape[1] != embedding_dim:
        scale = 1 / math.sqrt(sids.num_levels)
        books = [torch.randn(size, embedding_dim) * scale for size in sids.codebook_sizes]
    else:
        books = [book.to(torch.get_default_device(), copy=True) for book in sids.codebooks]
    if len(set(sids.codebook_sizes)) == 1:
        return nn.Parameter(torch.stack(books))
    return nn.ParameterList(map(nn.Parameter, books))


def as_levels(codebooks: nn.Parameter | nn.ParameterList) -> Tensor | Sequence[Tensor]:
    return codebooks if isinstance(codebooks, Tensor) else list(codebooks)


def make_table(num_rows: int, dim: int, rows_per_item: int, sparse: bool) -> nn.Embedding:
    """A hash table ``[R, D]`` whose rows, ``rows_per_item`` of them summed, start from N(0, 1).

    It is never called; but `DistributedDataParallel` expects a sparse gradient only of what an ``nn.Embedding`` owns.
    """
    weight = torch.randn(num_rows, dim).div_(rows_per_item**0.5)
    return nn.Embedding(num_rows, dim, sparse=sparse, _weight=weight)


def make_hashing(
    mode: str, num_embeddings: int, num_buckets: int | None, num_hashes: int
) -> tuple[Hashing, int, int]:
    """The hashing of ids in [0, num_embeddings), the number of rows of its table, and how many of them an id has.

    Raises:
        ValueError: an unknown mode, or a number of buckets that the mode cannot have.
    """
    if mode == "direct":
        if num_buckets not in (None, num_embeddings):
            raise ValueError(
                f"num_buckets must be None or num_embeddings = {num_embeddings} with mode='direct', got {num_buckets}"
            )
        return Hashing.direct(), num_embeddings, 1
    if mode == "multi":
        if num_buckets is None or num_buckets < 1:
            raise ValueError(f"num_buckets must be at least 1 with mode='multi', got {num_buckets}")
        return Hashing.multi(num_hashes), num_buckets, num_hashes
    if mode == "qr":
        if num_buckets is None:
            divisor = math.isqrt(max(num_embeddings - 1, 0)) + 1
        else:
            divisor = _divisor_for(num_embeddings, num_buckets)
        hashing = Hashing.qr(num_embeddings, min(divisor, num_embeddings))
        return hashing, hashing.divisor + -(-num_embeddings // hashing.divisor), 2
    raise ValueError(f"mode must be one of 'direct', 'multi', 'qr', got {mode!r}")


def _divisor_for(num_embeddings: int, num_buckets: int) -> int:
    """The divisor m with ``m + ceil(num_embeddings / m) == num_buckets``; the larger one, with fewer quotients."""
    for divisor in range(min(num_buckets - 1, num_embeddings), 0, -1):
        if divisor + -(-num_embeddings // divisor) == num_buckets:
            return divisor
    raise ValueError(
        f"num_buckets must be m + ceil({num_embeddings} / m) for some m with mode='qr', got {num_buckets}"
    )


def all_vectors(layer: nn.Module) -> Tensor:
    """What an embedding layer gives for each of its ids, ``[num_embeddings, *]``."""
    device = next(layer.parameters()).device
    return layer(torch.arange(layer.num_embeddings, device=device))


def check_padding_idx(padding_idx: int | None, num_embeddings: int) -> int | None:
    """A negative index counts from the end, as in ``nn.Embedding``; ``num_embeddings`` is a legal marker too."""
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx <= num_embeddings:
        raise ValueError(f"padding_idx must lie in [{-num_embeddings}, {num_embeddings}], got {padding_idx}")
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx


def start_from_content(hash_table: Tensor, vectors: Tensor, mode: str) -> None:
    """Writes the principal components of ``vectors [R, D0]`` into ``hash_table [R, D]``, at the table's own scale.

    With D0 < D the columns left keep a tenth of their start, which tells items with equal content apart.
    """
    if mode != "direct":
        raise ValueError(f"mode must be 'direct' for a start from content, got {mode!r}")
    num_rows, dim = hash_table.shape
    if vectors.dim() != 2 or vectors.shape[0] != num_rows:
        raise ValueError(f"vectors must have shape [{num_rows}, D0], got {list(vectors.shape)}")
    scale = hash_table.std()
    mean = sum(part.sum(0) for part in _float_parts(vectors, hash_table)) / num_rows
    products = sum((part - mean).T @ (part - mean) for part in _float_parts(vectors, hash_table))  # [D0, D0]
    squares, directions = torch.linalg.eigh(products)  # ascending
    squares, directions = squares.flip(0)[:dim], directions.flip(1)[:, :dim]  # [D0, k], k = min(D0, D)
    # A direction's sign is arbitrary: the largest weight is made positive, so that machines agree.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    spread = (squares.clamp_min(0).sum() / max(num_rows * len(squares) - 1, 1)).sqrt()
    directions = directions * (scale / spread.clamp_min(1e-12))
    hash_table.mul_(0.1)
    start = 0
    for part in _float_parts(vectors, hash_table):
        hash_table[start : start + len(part), : len(squares)] = (part - mean) @ directions
        start += len(part)


def _float_parts(vectors: Tensor, like: Tensor) -> Iterator[Tensor]:
    for part in vectors.split(_PART_ROWS):
        yield part.to(like.device, torch.float32)

"""K-means on residuals, level by level: codebooks for residual quantization, learned from batches of vectors."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from h2rec.ops.residual_quantize import residual_quantize
from h2rec.ops.vector_batches import VectorSource, vector_batches

# Rows of the sample that the start is drawn from, for each codeword.
_START_ROWS = 64

Progress = Callable[[int, int, float], None]


def fit_codebooks(
    vectors: VectorSource,
    sizes: Sequence[int],
    *,
    num_iters: int = 25,
    seed: int = 0,
    batch_size: int = 16_384,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Codebooks by k-means on what the levels before left over.

    Each level starts from k-means++ (Arthur and Vassilvitskii, SODA 2007) on a sample and takes up to ``num_iters``
    Lloyd steps; a codeword without vectors moves to one of the vectors farthest from theirs. A tensor or array in
    memory costs one copy in fp32; a memory map or a stream costs nothing of its size, and is read again for each
    step. The result depends on the seed, not on the number of threads.

    Args:
        vectors: ``[N, D]``, or a function that returns batches of such rows, see
            :func:`h2rec.ops.vector_batches.vector_batches`.
        sizes: codewords of each level.
        progress: called after each step with the level, the step and the mean squared distance.

    Returns:
        One ``[K_l, D]`` fp32 tensor per level.

    Raises:
        ValueError: a size is wrong, there are fewer vectors than codewords, or rows are not finite.
    """
    sizes = list(sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be positive, one for each level, got {sizes}")
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    residuals = _Residuals(vectors, batch_size)
    if residuals.num_rows < max(sizes):
        raise ValueError(
            f"vectors must have at least as many rows as a level has codewords, {max(sizes)}, got {residuals.num_rows}"
        )
    generator = torch.Generator().manual_seed(seed)
    for level, size in enumerate(sizes):
        codebook = _start(residuals.sample(size * _START_ROWS, generator), size, generator)
        previous = None
        for step in range(num_iters):
            codebook, error = _lloyd_step(residuals.batches(), codebook)
            if progress is not None:
                progress(level, step, error)
            if error == previous:
                break
            previous = error
        residuals.advance(codebook)
    return residuals.codebooks


class _Residuals:
    """What the levels so far leave of the vectors."""

    def __init__(self, vectors: VectorSource, batch_size: int) -> None:
        self.vectors, self.batch_size = vectors, batch_size
        self.codebooks: list[Tensor] = []
        in_memory = isinstance(vectors, Tensor) or (
            isinstance(vectors, np.ndarray) and not isinstance(vectors, np.memmap)
        )
        self.kept = None
        if in_memory:
            self.kept = torch.cat(
                [batch.clone() for batch in vector_batches(vectors, batch_size)] or [_EMPTY]
            )
            self.num_rows = len(self.kept)
        else:
            self.num_rows = sum(len(batch) for batch in vector_batches(vectors, batch_size))

    def batches(self) -> Iterator[Tensor]:
        if self.kept is not None:
            yield from self.kept.split(self.batch_size)
            return
        for batch in vector_batches(self.vectors, self.batch_size):
            yield batch - residual_quantize(batch, self.codebooks)[0] if self.codebooks else batch

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """At most ``count`` different rows, in their order."""
        rows = torch.randperm(self.num_rows, generator=generator)[:count].sort().values
        parts, start = [], 0
        for batch in self.batches():
            within = rows[(rows >= start) & (rows < start + len(batch))] - start
            parts.append(batch[within.to(batch.device)])
            start += len(batch)
        return torch.cat(parts)

    def advance(self, codebook: Tensor) -> None:
        self.codebooks.append(codebook)
        if self.kept is not None:
            for batch in self.kept.split(self.batch_size):  # views: written in place
                batch -= residual_quantize(batch, [codebook])[0]


_EMPTY = torch.zeros(0, 1)


def _start(sample: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next codeword is a row drawn with a chance in proportion to its squared distance so far."""
    chosen = [int(torch.randint(len(sample), (), generator=generator))]
    distance = torch.full((len(sample),), torch.inf, device=sample.device)
    norms = sample.square().sum(1)
    for _ in range(1, size):
        last = chosen[-1]
        to_last = (norms - 2 * (sample @ sample[last]) + norms[last]).clamp_min(0)
        to_last[last] = 0  # rounding may leave a little, and a row is not drawn twice while others are left
        distance = torch.minimum(distance, to_last)
        cumulative = distance.double().cumsum(0).cpu()
        if cumulative[-1] > 0:
            target = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
            chosen.append(min(int(torch.searchsorted(cumulative, target, right=True)), len(sample) - 1))
        else:  # fewer different rows than codewords
            chosen.append(int(torch.randint(len(sample), (), generator=generator)))
    return sample[chosen].clone()


def _lloyd_step(batches: Iterator[Tensor], codebook: Tensor) -> tuple[Tensor, float]:
    """The means of the vectors nearest to each codeword, and the mean squared distance to the old codewords."""
    size, dim = codebook.shape
    sums = torch.zeros(size, dim, dtype=torch.float64, device=codebook.device)
    counts = torch.zeros(size, dtype=torch.int64, device=codebook.device)
    far_distance, far_rows = codebook.new_empty(0), codebook.new_empty(0, dim)
    total, num_rows = torch.zeros((), dtype=torch.float64, device=codebook.device), 0
    for batch in batches:
        quantized, codes = residual_quantize(batch, [codebook])
        codes = codes[:, 0].long()
        distance = (batch - quantized).square().sum(1)  # [B]
        # A sum in fixed order on every device, which index_add_ is not.
        sums += torch.ops.aten.embedding_dense_backward(batch.double(), codes, size, -1, False)
        counts += torch.bincount(codes, minlength=size)
        total += distance.double().sum()
        num_rows += len(batch)
        far_distance, farthest = torch.cat([far_distance, distance]).topk(
            min(size, len(far_distance) + len(batch))
        )
        far_rows = torch.cat([far_rows, batch])[farthest]
    empty = counts == 0
    means = (sums / counts.clamp_min(1).unsqueeze(1)).to(codebook.dtype)
    order = (empty.cumsum(0) - 1).clamp(
        0, len(far_rows) - 1
    )  # the i-th empty codeword gets the i-th farthest vector
    return torch.where(empty.unsqueeze(1), far_rows[order], means), (total / num_rows).item()

"""RQ-KMeans: semantic IDs by k-means on residuals."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from h2rec import ops
from h2rec._version import __version__
from h2rec.ops.kmeans import Progress, fit_codebooks
from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds


class RQKMeans:
    """Learns one codebook per level by k-means, each on what the levels before left over.

    Args:
        num_levels: codes of an item.
        codebook_size: codewords of each level, or one number per level.
        num_iters: most Lloyd steps of a level.
        seed: of the start; the same seed and vectors give the same codes.
        batch_size: vectors that are worked on at a time.
        mini_batch, balance: as in :func:`h2rec.ops.kmeans.fit_codebooks`.

    Raises:
        ValueError: a size is wrong.
    """

    def __init__(
        self,
        num_levels: int = 4,
        codebook_size: int | Sequence[int] = 256,
        *,
        num_iters: int = 25,
        seed: int = 0,
        batch_size: int = 16_384,
        mini_batch: bool = False,
        balance: float = 0.0,
    ) -> None:
        sizes = [codebook_size] * num_levels if isinstance(codebook_size, int) else list(codebook_size)
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        if len(sizes) != num_levels or min(sizes) < 1:
            raise ValueError(
                f"codebook_size must be positive, or num_levels = {num_levels} positive numbers, got {codebook_size}"
            )
        self.codebook_sizes = tuple(sizes)
        self.num_iters = num_iters
        self.seed = seed
        self.batch_size = batch_size
        self.mini_batch = mini_batch
        self.balance = balance
        self.codebooks: list[Tensor] | None = None

    def fit(self, vectors: VectorSource, progress: Progress | None = None) -> "RQKMeans":
        """Learns the codebooks; arguments and errors are those of :func:`h2rec.ops.kmeans.fit_codebooks`."""
        self.codebooks = fit_codebooks(
            vectors,
            self.codebook_sizes,
            num_iters=self.num_iters,
            seed=self.seed,
            batch_size=self.batch_size,
            mini_batch=self.mini_batch,
            balance=self.balance,
            progress=progress,
        )
        return self

    def tokenize(self, vectors: VectorSource, beam_size: int = 1) -> SemanticIds:
        """The semantic IDs of ``vectors [N, D]``, with the codebooks and how they were made.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: the dimension is another one, or rows are not finite.
        """
        if self.codebooks is None:
            raise RuntimeError("fit must be called before tokenize")
        codes = [
            ops.residual_quantize(batch, self.codebooks, beam_size=beam_size)[1].cpu()
            for batch in vector_batches(vectors, self.batch_size)
        ]
        provenance = {
            "method": "RQ-KMeans",
            "h2rec": __version__,
            "dim": str(self.codebooks[0].shape[1]),
            "num_iters": str(self.num_iters),
            "seed": str(self.seed),
            "mini_batch": str(self.mini_batch),
            "balance": str(self.balance),
            "beam_size": str(beam_size),
            "codebook_sizes": json.dumps(self.codebook_sizes),
        }
        return SemanticIds(
            torch.cat(codes),
            codebook_sizes=self.codebook_sizes,
            codebooks=[codebook.cpu() for codebook in self.codebooks],
            provenance=provenance,
        )

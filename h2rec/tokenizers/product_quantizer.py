"""Product quantization: each code stands for a part of the vector of its own."""

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from h2rec.ops._codebooks import level_sizes
from h2rec.ops.kmeans import Progress, fit_codebooks
from h2rec.ops.vector_batches import VectorSource, check_repeatable, vector_batches
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers._encode import OnEncode, encode
from h2rec.tokenizers.checkpoint import CodebookCheckpoint


class ProductQuantizer:
    """Cuts vectors into parts of nearly equal width and learns a codebook for each (Jegou et al., PAMI 2011).

    A codeword is kept as a vector ``[D]`` that is zero outside its part. The sum of an item's codewords is then its
    reconstruction and the nearest codeword of a residual that of its part, as for any residual quantizer: layers,
    ``append`` and the resolution of collisions need not know the difference.

    Args:
        num_parts: codes of an item.
        codebook_size: codewords of each part, or one number per part.
        num_iters, seed, batch_size: as in :class:`h2rec.tokenizers.RQKMeans`.

    Raises:
        ValueError: a size is wrong.
    """

    def __init__(
        self,
        num_parts: int = 4,
        codebook_size: int | Sequence[int] = 256,
        *,
        num_iters: int = 25,
        seed: int = 0,
        batch_size: int = 4096,
    ) -> None:
        self.codebook_sizes = level_sizes(num_parts, codebook_size, "num_parts")
        self.num_iters = num_iters
        self.seed = seed
        self.batch_size = batch_size
        self.codebooks: list[Tensor] | None = None

    def fit(
        self,
        vectors: VectorSource,
        progress: Progress | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> "ProductQuantizer":
        """Learns the codebooks; errors are those of :func:`h2rec.ops.kmeans.fit_codebooks`.

        Args:
            checkpoint: a folder, as in :meth:`h2rec.tokenizers.RQKMeans.fit`; each part is kept when it is done.
            group: as there.
        """
        check_repeatable(vectors)
        first = _first_batch(vectors, self.batch_size)
        dim = first.shape[1]
        num_parts = len(self.codebook_sizes)
        if dim < num_parts:
            raise ValueError(f"vectors must have at least num_parts = {num_parts} dimensions, got {dim}")
        edges = [part * dim // num_parts for part in range(num_parts + 1)]
        kept = CodebookCheckpoint(checkpoint, [self._settings(), self.batch_size], vectors, group)
        codebooks = [codebook.to(first.device) for codebook in kept.load()]
        for part in range(len(codebooks), num_parts):
            columns = slice(edges[part], edges[part + 1])

            def show(_level: int, step: int, error: float, part: int = part) -> None:
                if progress is not None:
                    progress(part, step, error)

            (narrow,) = fit_codebooks(
                _columns(vectors, columns, self.batch_size),
                [self.codebook_sizes[part]],
                num_iters=self.num_iters,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=show,
                group=group,
            )
            codebooks.append(torch.nn.functional.pad(narrow, (columns.start, dim - columns.stop)))
            kept.save(codebooks)
        self.codebooks = codebooks
        return self

    def tokenize(
        self,
        vectors: VectorSource,
        progress: OnEncode | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> SemanticIds:
        """The semantic IDs of ``vectors [N, D]``; see :meth:`h2rec.tokenizers.RQKMeans.tokenize`."""
        return encode(
            self.codebooks,
            vectors,
            batch_size=self.batch_size,
            provenance=self._settings(),
            progress=progress,
            folder=checkpoint,
        )

    def _settings(self) -> dict[str, object]:
        return {
            "method": "PQ",
            "num_iters": self.num_iters,
            "seed": self.seed,
            "codebook_sizes": self.codebook_sizes,
        }


def _first_batch(vectors: VectorSource, batch_size: int) -> Tensor:
    first = next(iter(vector_batches(vectors, batch_size)), None)
    if first is None:
        raise ValueError("vectors must have rows, got none")
    return first


def _columns(vectors: VectorSource, columns: slice, batch_size: int) -> VectorSource:
    if isinstance(vectors, Tensor | np.ndarray):
        return vectors[:, columns]
    return lambda: (batch[:, columns] for batch in vector_batches(vectors, batch_size))

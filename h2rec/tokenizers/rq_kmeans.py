"""RQ-KMeans: semantic IDs by k-means on residuals."""

import os
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from h2rec.ops._codebooks import level_sizes
from h2rec.ops.kmeans import Progress, fit_codebooks
from h2rec.ops.vector_batches import VectorSource
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers._encode import OnEncode, encode
from h2rec.tokenizers.checkpoint import CodebookCheckpoint


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
        batch_size: int = 4096,
        mini_batch: bool = False,
        balance: float = 0.0,
    ) -> None:
        self.codebook_sizes = level_sizes(num_levels, codebook_size)
        self.num_iters = num_iters
        self.seed = seed
        self.batch_size = batch_size
        self.mini_batch = mini_batch
        self.balance = balance
        self.codebooks: list[Tensor] | None = None

    def fit(
        self,
        vectors: VectorSource,
        progress: Progress | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> "RQKMeans":
        """Learns the codebooks; arguments and errors are those of :func:`h2rec.ops.kmeans.fit_codebooks`.

        Args:
            group: processes that share the work, each with the same vectors, and get the same codebooks as one.
            checkpoint: a folder, where each level is kept when it is done. Called again with the same settings and
                vectors after an interruption, ``fit`` goes on there, and ends where it would have ended. Of a group
                the first process has it.
        """
        kept = CodebookCheckpoint(checkpoint, [self._settings(), self.batch_size], vectors, group)
        self.codebooks = fit_codebooks(
            vectors,
            self.codebook_sizes,
            num_iters=self.num_iters,
            seed=self.seed,
            batch_size=self.batch_size,
            mini_batch=self.mini_batch,
            balance=self.balance,
            progress=progress,
            first=kept.load(),
            on_level=kept.save,
            group=group,
        )
        return self

    def tokenize(
        self,
        vectors: VectorSource,
        beam_size: int = 1,
        progress: OnEncode | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> SemanticIds:
        """The semantic IDs of ``vectors [N, D]``, with the codebooks and how they were made.

        Args:
            beam_size: as in :func:`h2rec.ops.residual_quantize`.
            progress: called after each batch with an :class:`h2rec.tokenizers.EncodeProgress`.
            checkpoint: as in :meth:`fit`; the codes of each batch are kept.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: the dimension is another one, or rows are not finite.
        """
        return encode(
            self.codebooks,
            vectors,
            batch_size=self.batch_size,
            beam_size=beam_size,
            provenance=self._settings(),
            progress=progress,
            folder=checkpoint,
        )

    def _settings(self) -> dict[str, object]:
        return {
            "method": "RQ-KMeans",
            "num_iters": self.num_iters,
            "seed": self.seed,
            "mini_batch": self.mini_batch,
            "balance": self.balance,
            "codebook_sizes": self.codebook_sizes,
        }

"""What tokenizers share: sizes, and codes of any source of vectors, batch by batch."""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from h2rec import ops
from h2rec._version import __version__
from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers.checkpoint import Checkpoint, digest

# Batches of tens of megabytes leave holes in the heap that add up to hundreds.
_MOST_ROWS = 4096


class EncodeProgress(NamedTuple):
    """How far a tokenizer is; ``total`` and ``seconds_left`` are None for a stream."""

    done: int
    total: int | None
    rows_per_second: float
    seconds_left: float | None


OnEncode = Callable[[EncodeProgress], None]


def num_rows(vectors: VectorSource) -> int | None:
    """How many rows there will be, where that is known; the length of a collection is that of its batches."""
    if not isinstance(vectors, Tensor | np.ndarray) and not callable(vectors):
        return None
    try:
        return len(vectors)
    except TypeError:
        return None


def encode(
    codebooks: Sequence[Tensor] | None,
    vectors: VectorSource,
    *,
    batch_size: int,
    beam_size: int = 1,
    provenance: dict[str, object],
    progress: OnEncode | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> SemanticIds:
    """Semantic IDs of ``vectors [N, D]``; one batch of them is in memory. Codes are kept in ``folder``."""
    if codebooks is None:
        raise RuntimeError("fit must be called before tokenize")
    dim, batch_size = codebooks[0].shape[1], min(batch_size, _MOST_ROWS)
    row_bytes = 4 * len(codebooks)
    total = num_rows(vectors)
    checkpoint = None
    if folder is not None:
        checkpoint = Checkpoint(folder, "codes", [digest(codebooks), beam_size, batch_size], vectors)
    # One buffer that grows: tensors kept from each batch would pin the heap between the batches' own.
    codes = bytearray(checkpoint.read_blocks(batch_size * row_bytes) if checkpoint else b"")
    resumed = len(codes) // row_bytes
    started, done = time.perf_counter(), 0
    for batch in vector_batches(vectors, batch_size):
        if batch.shape[1] != dim:
            raise ValueError(
                f"vectors must have dimension {dim}, as the codebooks have, got {batch.shape[1]}"
            )
        done += len(batch)
        if done > resumed:
            batch = batch.to(codebooks[0].device)
            block = ops.residual_quantize(batch, codebooks, beam_size=beam_size)[1].cpu().numpy().tobytes()
            codes += block
            if checkpoint is not None:
                checkpoint.append(block)
        if progress is not None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            progress(EncodeProgress(done, total, rate, None if total is None else (total - done) / rate))
    sizes = [len(codebook) for codebook in codebooks]
    provenance = {"h2rec": __version__, "dim": dim, **provenance, "beam_size": beam_size}
    return SemanticIds(
        np.frombuffer(codes, dtype=np.int32).reshape(-1, len(sizes)),
        codebook_sizes=sizes,
        codebooks=[codebook.cpu() for codebook in codebooks],
        provenance={
            name: value if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()
        },
    )

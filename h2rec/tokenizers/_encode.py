"""What tokenizers share: sizes, and codes of any source of vectors, batch by batch."""

import json
import time
from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple

import numpy as np
from torch import Tensor

from h2rec import ops
from h2rec._version import __version__
from h2rec.ops.vector_batches import VectorSource, vector_batches
from h2rec.semantic_ids import SemanticIds

# Batches of tens of megabytes leave holes in the heap that add up to hundreds.
_MOST_ROWS = 4096


class EncodeProgress(NamedTuple):
    """How far a tokenizer is; ``total`` and ``seconds_left`` are None for a stream."""

    done: int
    total: int | None
    rows_per_second: float
    seconds_left: float | None


OnEncode = Callable[[EncodeProgress], None]


def level_sizes(
    num_levels: int, codebook_size: int | Sequence[int], name: str = "num_levels"
) -> tuple[int, ...]:
    if num_levels < 1:
        raise ValueError(f"{name} must be at least 1, got {num_levels}")
    sizes = [codebook_size] * num_levels if isinstance(codebook_size, int) else list(codebook_size)
    if len(sizes) != num_levels or min(sizes) < 1:
        raise ValueError(
            f"codebook_size must be positive, or {name} = {num_levels} positive numbers, got {codebook_size}"
        )
    return tuple(sizes)


def encode(
    codebooks: Sequence[Tensor] | None,
    vectors: VectorSource,
    *,
    batch_size: int,
    beam_size: int = 1,
    provenance: dict[str, object],
    progress: OnEncode | None = None,
) -> SemanticIds:
    """Semantic IDs of ``vectors [N, D]``; of the vectors, one batch is in memory."""
    if codebooks is None:
        raise RuntimeError("fit must be called before tokenize")
    total = len(vectors) if isinstance(vectors, Sized) else None
    # One buffer that grows: tensors kept from each batch would pin the heap between the batches' own.
    started, done, codes = time.perf_counter(), 0, bytearray()
    for batch in vector_batches(vectors, min(batch_size, _MOST_ROWS)):
        codes += ops.residual_quantize(batch, codebooks, beam_size=beam_size)[1].cpu().numpy().tobytes()
        done += len(batch)
        if progress is not None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            progress(EncodeProgress(done, total, rate, None if total is None else (total - done) / rate))
    sizes = [len(codebook) for codebook in codebooks]
    provenance = {"h2rec": __version__, "dim": codebooks[0].shape[1], **provenance, "beam_size": beam_size}
    return SemanticIds(
        np.frombuffer(codes, dtype=np.int32).reshape(-1, len(sizes)),
        codebook_sizes=sizes,
        codebooks=[codebook.cpu() for codebook in codebooks],
        provenance={
            name: value if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()
        },
    )

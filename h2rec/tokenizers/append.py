"""New items after published ones, from vectors of any number, with a checkpoint."""

import os

from h2rec.ops.vector_batches import VectorSource
from h2rec.semantic_ids import SemanticIds
from h2rec.tokenizers._encode import OnEncode, encode

_BATCH_ROWS = 4096


def append(
    sids: SemanticIds,
    new_vectors: VectorSource,
    *,
    progress: OnEncode | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SemanticIds:
    """As :meth:`h2rec.SemanticIds.append`, and goes on after an interruption.

    Args:
        sids: published semantic IDs, with codebooks.
        new_vectors: ``[M, D]``, or batches of such rows.
        progress, checkpoint: as in :meth:`h2rec.tokenizers.RQKMeans.tokenize`.

    Raises:
        ValueError: the codebooks are not known, the dimension is another one, or rows are not finite.
    """
    new = encode(
        sids.encoding_codebooks,
        new_vectors,
        batch_size=_BATCH_ROWS,
        beam_size=sids.beam_size,
        provenance={},
        progress=progress,
        folder=checkpoint,
    )
    return sids.append_codes(new.codes)

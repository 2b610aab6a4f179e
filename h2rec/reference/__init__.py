"""The operators in plain PyTorch: the oracle of every test, and the backend that always works.

Written to be read. Functions take the operators' packed arguments (see ``h2rec/ops``), already checked.
"""

from h2rec.reference.alignment_loss import alignment_loss, alignment_loss_backward
from h2rec.reference.harmonized_embedding import harmonized_embedding, harmonized_embedding_backward
from h2rec.reference.residual_quantize import residual_quantize

__all__ = [
    "alignment_loss",
    "alignment_loss_backward",
    "harmonized_embedding",
    "harmonized_embedding_backward",
    "residual_quantize",
]

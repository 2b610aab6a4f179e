"""Triton kernels, installed as `h2rec.kernels`: tensors in, tensors out; nothing is registered here."""

from .alignment_loss import alignment_loss, alignment_loss_backward
from .harmonized_embedding import harmonized_embedding, harmonized_embedding_backward

__all__ = [
    "alignment_loss",
    "alignment_loss_backward",
    "harmonized_embedding",
    "harmonized_embedding_backward",
]

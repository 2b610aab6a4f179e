"""Triton kernels, installed as `h2rec.kernels`: tensors in, tensors out; nothing is registered here."""

from .harmonized_embedding import harmonized_embedding, harmonized_embedding_backward

__all__ = ["harmonized_embedding", "harmonized_embedding_backward"]

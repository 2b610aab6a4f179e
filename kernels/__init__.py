"""Triton kernels, installed as `h2rec.kernels`: tensors in, tensors out; nothing is registered here."""

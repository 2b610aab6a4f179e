"""One representation of codebooks for all kernels: the rows of all levels in one matrix, and the levels' sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from h2rec.ops._checks import check_dim, check_floating, check_size


def pack_codebooks(codebooks: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """``[L, K, D]`` or a sequence of ``[K_l, D]`` to ``([sum(K_l), D], [K_0, ...])``. A tensor is not copied."""
    if isinstance(codebooks, Tensor):
        check_floating("codebooks", codebooks)
        check_dim("codebooks", codebooks, ("L", "K", "D"))
        num_levels, size, dim = codebooks.shape
        sizes = [size] * num_levels
        _check_sizes(sizes)
        return codebooks.reshape(num_levels * size, dim), sizes
    codebooks = list(codebooks)
    for level, codebook in enumerate(codebooks):
        check_floating(f"codebooks[{level}]", codebook)
        check_dim(f"codebooks[{level}]", codebook, ("K", "D"))
        for what in ("dtype", "device"):
            ours, first = getattr(codebook, what), getattr(codebooks[0], what)
            if ours != first:
                raise ValueError(f"codebooks[{level}] has {what} {ours}, but codebooks[0] has {first}")
        if codebook.shape[1] != codebooks[0].shape[1]:
            raise ValueError(
                f"codebooks[{level}] has dimension {codebook.shape[1]}, but codebooks[0] has {codebooks[0].shape[1]}"
            )
    sizes = [codebook.shape[0] for codebook in codebooks]
    _check_sizes(sizes)
    return torch.cat(codebooks), sizes


def level_sizes(
    num_levels: int, codebook_size: int | Sequence[int], name: str = "num_levels"
) -> tuple[int, ...]:
    """The codewords of each level, from one number for all or one for each; ``name`` is what errors call the first."""
    check_size(name, num_levels)
    sizes = [codebook_size] * num_levels if isinstance(codebook_size, int) else list(codebook_size)
    if len(sizes) != num_levels or min(sizes) < 1:
        raise ValueError(
            f"codebook_size must be positive, or {name} = {num_levels} positive numbers, got {codebook_size}"
        )
    return tuple(sizes)


def _check_sizes(sizes: list[int]) -> None:
    if not sizes:
        raise ValueError("codebooks must have at least one level, got none")
    for level, size in enumerate(sizes):
        if size < 1:
            raise ValueError(f"codebooks[{level}] must have at least one codeword, got none")

"""Residual quantization with beam search, one block of rows at a time."""

import torch
from torch import Tensor

# Floats of the largest intermediate, [rows, beam * K] distances or [rows, beam, D] partial sums: 16 MiB in fp32.
_BLOCK_ELEMENTS = 4 << 20


def residual_quantize(
    x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int
) -> tuple[Tensor, Tensor]:
    """Returns ``(quantized [N, D] in x.dtype, codes [N, L] int32)`` for packed ``codebooks [sum(sizes), D]``."""
    compute = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    levels = codebooks.to(compute).split(sizes)
    quantized = torch.empty_like(x, memory_format=torch.contiguous_format)
    codes = x.new_empty((x.shape[0], len(sizes)), dtype=torch.int32)
    widest = beam_size * max(max(sizes), x.shape[1], 1)
    block = max(1, _BLOCK_ELEMENTS // widest)
    for start in range(0, x.shape[0], block):
        rows = slice(start, start + block)
        quantized[rows], codes[rows] = _quantize_block(x[rows].to(compute), levels, beam_size)
    return quantized, codes


def _quantize_block(x: Tensor, levels: tuple[Tensor, ...], beam_size: int) -> tuple[Tensor, Tensor]:
    num_rows, dim = x.shape
    residual = x.unsqueeze(1)  # [n, b, D], b partial sums per row, best first
    codes = torch.empty((num_rows, 1, 0), dtype=torch.int64, device=x.device)  # [n, b, level]
    for codebook in levels:
        # |r - c|^2 = |r|^2 + |c|^2 - 2 <r, c>; |r|^2 tells beams of one row apart, and is not needed for one.
        scores = codebook.square().sum(1) - 2 * (residual @ codebook.T)  # [n, b, K]
        if beam_size == 1:
            best = scores.argmin(2)  # [n, 1]; the lowest index on a tie
        else:
            scores = scores + residual.square().sum(2, keepdim=True)
            # A stable sort keeps the order (parent, code) among equals.
            best = scores.flatten(1).argsort(dim=1, stable=True)[:, :beam_size]  # [n, b']
        parent, code = best // codebook.shape[0], best % codebook.shape[0]
        chosen = parent.unsqueeze(2)
        residual = residual.gather(1, chosen.expand(-1, -1, dim)) - codebook[code]
        codes = torch.cat([codes.gather(1, chosen.expand(-1, -1, codes.shape[2])), code.unsqueeze(2)], 2)
    best_codes = codes[:, 0]  # [n, L]
    quantized = torch.zeros_like(x)
    for level, codebook in enumerate(levels):
        quantized += codebook[best_codes[:, level]]
    return quantized, best_codes.to(torch.int32)

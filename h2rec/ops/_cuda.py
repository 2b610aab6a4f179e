"""Backend ``cuda``: the kernels of ``csrc/cuda``, with the signatures of :mod:`h2rec.reference`."""

import torch
from torch import Tensor

from h2rec import reference


def residual_quantize(
    x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int
) -> tuple[Tensor, Tensor]:
    if beam_size > 1:  # the kernel walks one path
        return reference.residual_quantize(x, codebooks, sizes, beam_size)
    compute = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    wide = x.to(compute) if compute == torch.float64 else x  # the kernel itself widens to fp32
    level_sizes = torch.tensor(sizes, dtype=torch.int64, device=x.device)
    quantized, codes = torch.ops.h2rec._cuda_residual_quantize(wide, codebooks.to(compute), level_sizes)
    return quantized.to(x.dtype), codes

"""Backend ``cuda``: the kernels of ``csrc/cuda``, with the signatures of :mod:`h2rec.reference`."""

import torch
from torch import Tensor


def residual_quantize(
    x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    return torch.ops.h2rec._cuda_residual_quantize(x, codebooks.to(compute).contiguous(), sizes, beam_size)

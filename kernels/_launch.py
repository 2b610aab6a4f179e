"""What launchers share."""

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Contraction to multiply-adds is asked for by name: Triton 3.10 changes its default.
OPTIONS = {"enable_fp_fusion": True}


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Kernels that are launched in the block run on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def tile_elements(on_gpu: int) -> int:
    """Elements of a program's tile: the interpreter costs by the program and hardly by the element."""
    return 1 << 18 if INTERPRETED else on_gpu


@triton.jit
def as_stored(values, dtype: tl.constexpr):
    """``values`` rounded to ``dtype``, to nearest: the interpreter would cut fp32 off to make bf16 of it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(is_nan, bits, bits + 0x7FFF + ((bits >> 16) & 1))
        return (rounded & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return values.to(dtype)

"""The CUDA kernels as a backend on the CPU: csrc/cuda compiled by the C++ compiler, with cuda_emulation.h as CUDA."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[1] / "csrc" / "cuda"
CXX = shutil.which(os.environ.get("CXX", "c++"))
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of h2rec::cuda::Dtype


def compile_emulated(source: Path, out: Path, *flags: str, kernels: Path = CUDA_SOURCES) -> None:
    includes = (f"-I{HERE}", f"-I{kernels}")
    command = [
        CXX,
        "-std=c++17",
        "-Wno-unknown-pragmas",
        *includes,
        *flags,
        "-x",
        "c++",
        str(source),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True)


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:  # what is loaded may be deleted
        path = Path(folder) / "emulated.so"
        compile_emulated(HERE / "emulated.cpp", path, "-O2", "-shared", "-fPIC")
        return ctypes.CDLL(str(path))


def residual_quantize(
    x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int
) -> tuple[Tensor, Tensor]:
    """What h2rec.ops._cuda and csrc/ops.cpp do, for tensors on the CPU."""
    assert beam_size == 1
    wide = torch.float64 in (x.dtype, codebooks.dtype)
    compute = torch.float64 if wide else torch.float32
    dtype = x.dtype
    x = (x.double() if wide else x).contiguous()
    codebooks = codebooks.to(compute).contiguous()
    quantized = torch.empty_like(x)
    codes = x.new_empty((x.shape[0], len(sizes)), dtype=torch.int32)
    size_array = (ctypes.c_int64 * len(sizes))(*sizes)
    vectorised = x.shape[1] % 4 == 0 and x.data_ptr() % 16 == codebooks.data_ptr() % 16 == 0
    error = _library().h2rec_residual_quantize(
        *map(ctypes.c_void_p, (x.data_ptr(), codebooks.data_ptr())),
        size_array,
        *map(ctypes.c_void_p, (quantized.data_ptr(), codes.data_ptr())),
        *map(ctypes.c_int64, x.shape),
        len(sizes),
        _DTYPES.index(x.dtype),
        ctypes.c_bool(vectorised),
    )
    assert error == 0, f"cudaError {error}, see stderr"
    return quantized.to(dtype), codes

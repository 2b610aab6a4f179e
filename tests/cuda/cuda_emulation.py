"""The CUDA kernels as a backend on the CPU: csrc/cuda compiled by the C++ compiler, with cuda_emulation.h as CUDA."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

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
    x: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    beam_size: int,
    *,
    tables: bool | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What h2rec.ops._cuda and csrc/ops.cpp do, for tensors on the CPU; ``tables`` and ``capacity`` as in csrc/cuda."""
    compute = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    codebooks = codebooks.to(compute).contiguous()
    quantized = torch.empty_like(x, memory_format=torch.contiguous_format)
    codes = x.new_empty((x.shape[0], len(sizes)), dtype=torch.int32)
    error = _library().h2rec_residual_quantize(
        ctypes.c_void_p(x.data_ptr()),
        _DTYPES.index(x.dtype),
        *map(ctypes.c_int64, (*x.stride(), *x.shape)),
        ctypes.c_void_p(codebooks.data_ptr()),
        (ctypes.c_int64 * len(sizes))(*sizes),
        len(sizes),
        _DTYPES.index(compute),
        beam_size,
        -1 if tables is None else int(tables),
        -1 if capacity is None else capacity,
        *map(ctypes.c_void_p, (quantized.data_ptr(), codes.data_ptr())),
    )
    assert error == 0, f"cudaError {error}, see stderr"
    return quantized, codes


class Plan(NamedTuple):
    tables: bool
    workspace_bytes: int


def plan_residual_quantize(num_rows: int, dim: int, sizes: list[int], beam_size: int) -> Plan:
    """What csrc/cuda chooses for fp32 vectors."""
    tables, workspace_bytes = ctypes.c_bool(), ctypes.c_int64()
    _library().h2rec_plan_residual_quantize(
        *map(ctypes.c_int64, (num_rows, dim)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        len(sizes),
        beam_size,
        ctypes.byref(tables),
        ctypes.byref(workspace_bytes),
    )
    return Plan(tables.value, workspace_bytes.value)

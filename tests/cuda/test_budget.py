"""What nvcc makes of the kernels: registers, spills, shared memory, and the instructions that must be there."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import cuda_emulation
import pytest

NVCC = shutil.which("nvcc")
SOURCE = cuda_emulation.CUDA_SOURCES / "residual_quantize.cu"
# At 128 threads a block: of a multiprocessor's 65,536 registers, 128 leave room for four blocks and 168 for three.
REGISTERS = {
    "search_kernelIf": 128,
    "search_kernelId": 128,
    "table_kernelIf": 96,
    "table_kernelId": 168,
    "prepare_level_kernelIf": 40,
    "prepare_level_kernelId": 40,
}
# Of the search: 16-byte loads from global and to shared memory, matrix operands from shared memory, matrix products.
INSTRUCTIONS = (
    "LDG.E.128",
    "LDGSTS.E.BYPASS.128",
    "LDSM.16",
    "HMMA.16816.F32",
    "LDS.128",
    "SHFL.BFLY",
    "VOTE.ANY",
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def compiled(request, tmp_path_factory) -> tuple[Path, str]:
    """A cubin, and what ptxas says of it."""
    cubin = tmp_path_factory.mktemp("cubin") / "residual_quantize.cubin"
    flags = ["-std=c++17", "-O3", f"-arch={request.param}", "-cubin", "-Xptxas", "-v"]
    result = subprocess.run([NVCC, *flags, str(SOURCE), "-o", str(cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return cubin, result.stderr


def test_resources(compiled):
    _, report = compiled
    assert report.count("Compiling entry function") == len(REGISTERS)
    for kernel, limit in REGISTERS.items():
        (used,) = re.findall(
            rf"Compiling entry function '\w*\d{kernel}E.*?Used (\d+) registers", report, re.S
        )
        assert int(used) <= limit, kernel
    for spilled in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report):
        assert spilled == "0", report
    assert "bytes smem" not in report  # all of it is dynamic, and a static_assert limits it


def test_instructions(compiled):
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec else Path()
    nvdisasm = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(folder))
    if nvdisasm is None:
        pytest.skip("nvdisasm is neither on the PATH nor in a triton package")
    listing = subprocess.run(
        [nvdisasm, "-c", str(compiled[0])], capture_output=True, text=True, check=True
    ).stdout
    sections = re.split(r"^//-+ ", listing, flags=re.M)
    (search,) = (s for s in sections if re.match(r"\.text\.\w*search_kernelIf", s))
    for instruction in INSTRUCTIONS:
        assert instruction in search, instruction
    assert not re.search(r"\b(LDL|STL)\b", listing)  # local memory

"""The device code under sanitizers: clean as it is, and each bug that is planted in it is caught."""

import os
import subprocess
from pathlib import Path

import cuda_emulation
import pytest

pytestmark = pytest.mark.skipif(cuda_emulation.CXX is None, reason="there is no C++ compiler")

# What stands in the kernel, and what stands there when the bug is active. {bug} is `planted(number)`.
BUGS = {
    "no barrier before a piece is replaced": (
        "__syncthreads();  // everybody",
        "if (!{bug}) __syncthreads();  // everybody",
    ),
    "no barrier after a piece is loaded": (
        "__syncthreads();  // the piece",
        "if (!{bug}) __syncthreads();  // the piece",
    ),
    "no barrier before codes are read": ("__syncwarp();  // a warp", "if (!{bug}) __syncwarp();  // a warp"),
    "barrier in divergent code": (
        "__syncthreads();  // the piece",
        "if ({bug} && lane > 3) __syncthreads(); else\n__syncthreads();  // the piece",
    ),
    "warp function in divergent code": (
        "const C other = __shfl",
        "if ({bug} && lane >= 16) break;\nconst C other = __shfl",
    ),
    "idle warps return": (
        "  const C* codebook = static_cast<const C*>(args.codebooks);\n  for (int level",
        "  if ({bug} && first_row + warp * kRowsPerWarp >= args.num_rows) return;\n"
        "  const C* codebook = static_cast<const C*>(args.codebooks);\n  for (int level",
    ),
    "no mask on loaded rows": ("first_row + row < args.num_rows", "first_row + row < args.num_rows || {bug}"),
    "no mask on written rows": (
        "if (row < args.num_rows) {\n      write_sum",
        "if (row < args.num_rows || {bug}) {\n      write_sum",
    ),
    "no mask on written codes": (
        "row < args.num_rows) {\n        // Nothing",
        "(row < args.num_rows || {bug})) {\n        // Nothing",
    ),
    "no mask on loaded codewords": ("if (first + k < size)", "if (first + k < size || {bug})"),
    "no mask on compared codewords": ("if (k < size)", "if (k < size || {bug})"),
    "no mask on the dimension": ("d + i < dim ? row", "d + i < dim || {bug} ? row"),
    "wide loads of unaligned rows": (
        "if (vectorised && d + 4 <= dim) {\n    return",
        "if ((vectorised || {bug}) && d + 4 <= dim) {\n    return",
    ),
    "wrong stride": (
        "store_aligned(codewords + k * kStride",
        "store_aligned(codewords + k * (kStride - 4 * {bug})",
    ),
    "one row too far in shared memory": (
        "const int k = i / (kDepth / 4),",
        "const int k = i / (kDepth / 4) + {bug},",
    ),
    "too little shared memory": ("kSharedBytes<float>, stream", "kSharedBytes<float> - 32 * {bug}, stream"),
    "ties go to the higher index": (
        "other_code < code",
        "({bug} ? other_code > code : other_code < code)",
    ),
    "half of the warp is left out": ("int step = 16", "int step = {bug} ? 8 : 16"),
    "codes of NaN out of range": ("best[q].code < size ?", "best[q].code < size || {bug} ?"),
    "every lane writes the code": ("if (lane == 0 &&", "if ((lane == 0 || {bug}) &&"),
    "the residual of the level before": (
        "args, first_row + row, level,",
        "args, first_row + row, level - ({bug} && level > 0),",
    ),
}
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
ORDERS = ("forward", "reverse", "random:5")


def plant(source: str) -> str:
    """The kernel with all bugs in it, each waiting for its number."""
    for number, (place, bug) in enumerate(BUGS.values(), start=1):
        assert source.count(place) == 1, place
        source = source.replace(place, bug.replace("{bug}", f"planted({number})"))
    return source


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sanitized")
    for header in ("device.h", "residual_quantize.h"):
        (folder / header).write_text((cuda_emulation.CUDA_SOURCES / header).read_text())
    kernel = (cuda_emulation.CUDA_SOURCES / "residual_quantize.cu").read_text()
    (folder / "residual_quantize.cu").write_text(plant(kernel))
    for name, flags in SANITIZERS.items():
        source = cuda_emulation.HERE / "driver.cpp"
        cuda_emulation.compile_emulated(source, folder / name, "-O1", "-g1", *flags, kernels=folder)
    return {name: folder / name for name in SANITIZERS}


def run(driver: Path, order: str, bug: int) -> subprocess.CompletedProcess:
    options = {
        "CUDA_EMULATION_ORDER": order,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [str(driver), str(bug)]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean(drivers: dict[str, Path], sanitizer: str, order: str):
    result = run(drivers[sanitizer], order, bug=0)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "agrees\n"
    assert result.stderr == ""


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(drivers: dict[str, Path], bug: str):
    number = list(BUGS).index(bug) + 1
    assert any(
        run(drivers[sanitizer], order, number).returncode != 0
        for sanitizer, order in [("address", "forward"), ("address", "reverse"), ("thread", "forward")]
    )

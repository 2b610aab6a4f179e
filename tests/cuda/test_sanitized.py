"""The device code under sanitizers: clean as it is, and each bug that is planted in it is caught."""

import os
import subprocess
from pathlib import Path

import cuda_emulation
import pytest

pytestmark = pytest.mark.skipif(cuda_emulation.CXX is None, reason="there is no C++ compiler")

# What stands in a kernel, and what stands there when the bug is active. {bug} is `planted(number)`.
BUGS = {
    # products.h: copies and matrix products
    "no wait for a copy": ("__pipeline_wait_prior(1);", "if (!{bug}) __pipeline_wait_prior(1);"),
    "one copy is not waited for": ("__pipeline_wait_prior(1);", "__pipeline_wait_prior({bug} ? 2 : 1);"),
    "the first copy is not committed": (
        "  __pipeline_commit();\n  for (int d",
        "  if (!{bug}) __pipeline_commit();\n  for (int d",
    ),
    "no barrier after a copy": (
        "__syncthreads();           // everybody's part",
        "if (!{bug}) __syncthreads();           // everybody's part",
    ),
    "no barrier before a stage is replaced": (
        "__syncthreads();  // everybody is done with this stage",
        "if (!{bug}) __syncthreads();  // everybody is done with this stage",
    ),
    "barrier in divergent code": (
        "__syncthreads();           // everybody's part",
        "if ({bug} && threadIdx.x > 3) __syncthreads(); else\n__syncthreads();  // everybody's part",
    ),
    "the next stage is the one in use": ("(d / kDepth + 1) % 2", "(d / kDepth + !{bug}) % 2"),
    "wrong stride of a stage": (
        "stage + row * kStageStride + piece",
        "stage + row * (kStageStride - 8 * {bug}) + piece",
    ),
    "stride of a matrix that wmma refuses": (
        "kStageStride + k, kStageStride);\n      }",
        "kStageStride + k, kStageStride - {bug});\n      }",
    ),
    "warps multiply the same columns": ("warp / 2 * 64", "warp / ({bug} ? 4 : 2) * 64"),
    "products are transposed": ("wmma::mem_row_major)", "{bug} ? wmma::mem_col_major : wmma::mem_row_major)"),
    # before the search
    "no mask on loaded codewords": ("exists = k < level.size", "exists = k < level.size || {bug}"),
    "a codeword's scale is forgotten": ("= -2 * scale", "= -2 * ({bug} ? 1 : scale)"),
    "no mask on a table's rows": ("if (row < level.first)", "if (row < level.first || {bug})"),
    "no mask on a table's codewords": ("column < level.size)", "column < level.size || {bug})"),
    "no barrier before a table's piece is replaced": (
        "__syncthreads();  // everybody is done with the last piece",
        "if (!{bug}) __syncthreads();  // everybody is done with the last piece",
    ),
    "no barrier after a table's piece is loaded": (
        "__syncthreads();  // the piece",
        "if (!{bug}) __syncthreads();  // the piece",
    ),
    "wrong stride of a table": ("row * level.padded +", "row * (level.padded - {bug}) +"),
    "wrong stride of a table in shared memory": (
        "store4(earlier + row * kTableStride",
        "store4(earlier + row * (kTableStride - 4 * {bug})",
    ),
    # rows and paths
    "no mask on rows": ("first_row + i < s.num_rows", "(first_row + i < s.num_rows || {bug})"),
    "no mask on the dimension": ("d + i < rows.dim ?", "d + i < rows.dim || {bug} ?"),
    "wide loads of unaligned rows": ("if (rows.wide && d", "if ((rows.wide || {bug}) && d"),
    "idle warps return": (
        "    for_each_row([&](const Row& row) { start",
        "    if ({bug} && first_row + warp >= s.num_rows) return;\n"
        "    for_each_row([&](const Row& row) { start",
    ),
    "a tile is skipped": ("tile += gridDim.x", "tile += gridDim.x + {bug}"),
    "blocks share their memory": (
        "static_cast<std::int64_t>(blockIdx.x) * s.tile_rows + i,",
        "static_cast<std::int64_t>({bug} ? 0 : blockIdx.x) * s.tile_rows + i,",
    ),
    "no barrier after a row's first path": (
        "__syncwarp();  // the path is",
        "if (!{bug}) __syncwarp();  // the path is",
    ),
    "the residual of the level before": (
        "const Four<C> r = residual4<C>(s, row, codes, level,",
        "const Four<C> r = residual4<C>(s, row, codes, level - ({bug} && level > 0),",
    ),
    "paths share their operand": ("beam_size + path;", "beam_size + ({bug} ? 0 : path);"),
    "a path's codes are replaced where they stand": ("* 2 + level % 2", "* 2 + ({bug} ? 0 : level % 2)"),
    # candidates
    "no barrier after the operands": (
        "__syncthreads();  // the operands",
        "if (!{bug}) __syncthreads();  // the operands",
    ),
    "no barrier before products are read": (
        "__syncthreads();  // the products are there",
        "if (!{bug}) __syncthreads();  // the products are there",
    ),
    "no barrier before products are replaced": (
        "__syncthreads();  // the products are read",
        "if (!{bug}) __syncthreads();  // the products are read",
    ),
    "no mask on upper bounds": ("k + i < info.size ? value", "k + i < info.size || {bug} ? value"),
    "no mask on candidates": ("k + i < info.size && !(lower", "(k + i < info.size || {bug}) && !(lower"),
    "the bound is too small": ("2 * products)", "2 * products * ({bug} ? 0.01 : 1))"),
    "the bound is not added": ("value + error :", "value + ({bug} ? -error : error) :"),
    "the lowest but one bounds": (
        "          limit = __shfl_sync(kAllLanes, lowest.key, keep - 1)",
        "          limit = __shfl_sync(kAllLanes, lowest.key, keep - 1 - {bug})",
    ),
    "paths are compared without their distance": (
        "square + path.distance",
        "square + ({bug} ? 0 : path.distance)",
    ),
    "candidates in the same place": ("count + __popc(all &", "count + __popc({bug} ? 0 : all &"),
    "candidates where there is no room": ("may_win && place < s", "may_win && ({bug} ? 0 : place) < s"),
    "no room is overlooked": (
        "no_room = count > s.plan.capacity",
        "no_room = !{bug} && count > s.plan.capacity",
    ),
    "a race on the count": (
        "__syncwarp();  // everybody has read",
        "if (!{bug}) __syncwarp();  // everybody has read",
    ),
    "every lane writes the count": (
        "if (row.lane == 0) {\n    s.counts",
        "if (row.lane == 0 || {bug}) {\n    s.counts",
    ),
    # the decision
    "ties go to the higher index": ("new_index < index", "({bug} ? new_index > index : new_index < index)"),
    "half of the warp is left out": (
        "warp_sum(C value) {\n#pragma unroll\n  for (int step = kWarpSize / 2",
        "warp_sum(C value) {\n#pragma unroll\n  for (int step = kWarpSize / ({bug} ? 4 : 2)",
    ),
    "warp function in divergent code": (
        "const C key_before",
        "if ({bug} && lane >= 16) return;\n    const C key_before",
    ),
    "no barrier before paths are replaced": (
        "__syncwarp();  // the paths are read",
        "if (!{bug}) __syncwarp();  // the paths are read",
    ),
    "no barrier after paths are replaced": (
        "__syncwarp();  // the new paths",
        "if (!{bug}) __syncwarp();  // the new paths",
    ),
    "rows of NaN look finite": ("sum = finite ?", "sum = finite || {bug} ?"),
    # the launch
    "too little shared memory": ("kSharedBytes, stream, s)", "kSharedBytes - 64 * {bug}, stream, s)"),
    "too little workspace": ("return taken;", "return taken - 256 * {bug};"),
}
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
ORDERS = ("forward", "reverse", "random:5")


def plant(sources: dict[str, str]) -> None:
    """Puts all bugs into the sources, each waiting for its number; those of one place are put one into the other."""
    for number, (place, bug) in enumerate(BUGS.values(), start=1):
        (name,) = (name for name, source in sources.items() if place in source)
        assert sources[name].count(place) == 1, place
        sources[name] = sources[name].replace(place, bug.replace("{bug}", f"planted({number})"))


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sanitized")
    sources = {path.name: path.read_text() for path in cuda_emulation.CUDA_SOURCES.iterdir()}
    plant(sources)
    for name, source in sources.items():
        (folder / name).write_text(source)
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

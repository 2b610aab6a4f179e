"""The device code, executed on the CPU, in three orders of its threads."""

import itertools

import cuda_emulation
import pytest
import torch

from h2rec import reference
from h2rec.ops.residual_quantize import narrow_beam
from h2rec.testing import assert_as_accurate_as_eager, assert_nearest_codes

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(cuda_emulation.CXX is None, reason="there is no C++ compiler"),
]

SHAPES = [  # rows, dimension, sizes of the levels
    (0, 8, [4, 4]),
    (1, 1, [1]),
    (3, 0, [2, 2]),
    (31, 20, [33, 33]),
    (64, 16, [127, 128, 129]),
    (65, 17, [5, 300, 1, 17]),
    (33, 64, [256] * 4),
    (5, 3, [10_000]),
    (40, 24, [7] * 16),
    (9, 770, [20, 20]),
    (300, 16, [9, 9]),  # more tiles than blocks
]


@pytest.fixture(params=["forward", "reverse", "random:5"])
def order(request, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATION_ORDER", request.param)


@pytest.fixture(params=[False, True], ids=["residuals", "tables"])
def tables(request) -> bool:
    return request.param


def normal_inputs(shape, dtype, generator):
    rows, dim, sizes = shape
    x = torch.randn(rows, dim, generator=generator).to(dtype)
    codebooks = [
        torch.randn(k, dim, generator=generator).to(dtype) / (level + 1) for level, k in enumerate(sizes)
    ]
    return x, codebooks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_nearest(shape, dtype, tables, generator):
    x, codebooks = normal_inputs(shape, dtype, generator)
    quantized, codes = cuda_emulation.residual_quantize(x, torch.cat(codebooks), shape[2], 1, tables=tables)
    assert quantized.dtype == dtype
    assert_nearest_codes(x, codebooks, quantized, codes)


@pytest.mark.parametrize("beam_size", [1, 3, 8, 1000])
def test_exact_ties(order, tables, beam_size, generator):
    """Small integers, where every distance is exact: the order of ties decides, within a warp's tile and beyond it."""
    grid = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=3)))
    codebooks = [
        torch.cat([grid] * 6),
        grid[::13],
        grid,
    ]  # the first has the same codewords in lanes and tiles of their own
    sizes = [len(codebook) for codebook in codebooks]
    x = torch.randint(-3, 4, (20, 3), generator=generator).float()
    beam_size = min(narrow_beam(sizes, beam_size), 32)
    expected = reference.residual_quantize(x, torch.cat(codebooks), sizes, beam_size)
    actual = cuda_emulation.residual_quantize(x, torch.cat(codebooks), sizes, beam_size, tables=tables)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def close_pairs(x, codebook, generator):
    codebook[1::2] = codebook[: len(codebook) // 2 * 2 : 2]
    codebook[1::2] *= 1 + 1e-4 * torch.randn(codebook[1::2].shape, generator=generator)
    return x, codebook


INPUTS = {  # what makes fp16 products of no, or of little use
    "normal": lambda x, codebook, _: (x, codebook),
    "close pairs": close_pairs,
    "more alike than there is room for": lambda x, codebook, _: (x, codebook[:1] + 1e-4 * codebook),
    "a common offset": lambda x, codebook, _: (x + 100, codebook + 100),
    "far too large for fp16": lambda x, codebook, _: (1e15 * x, 1e15 * codebook),
    "products overflow, distances do not": lambda x, codebook, _: (
        1.2e19 * torch.nn.functional.normalize(x),
        torch.cat([1.2e19 * torch.nn.functional.normalize(codebook[1:]), codebook[:1]]),
    ),
    "distances overflow": lambda x, codebook, _: (1e19 * x, 1e19 * codebook),
    "squares underflow": lambda x, codebook, _: (3e-22 * x, 3e-22 * codebook),
    "squares of a codeword are lost": lambda x, codebook, _: (
        x.abs(),
        torch.cat([torch.full_like(codebook[:1], 2.0**-76), codebook[1:]]),
    ),
    "one codeword is far away": lambda x, codebook, _: (x, torch.cat([codebook[:1] * 1e4, codebook[1:]])),
    "one codeword is not finite": lambda x, codebook, _: (
        x,
        torch.cat([codebook[:1] * torch.inf, codebook[1:]]),
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("beam_size", "compute"), [(1, torch.float32), (4, torch.float32), (1, torch.float64)]
)
def test_candidates_change_nothing(kind, beam_size, compute, tables, generator):
    """Codes are those of deciding on every codeword in fp32 or fp64, whatever the matrix products are worth."""
    x = torch.randn(12, 40, generator=generator)
    sizes = [51, 37, 20]
    codebooks = [INPUTS[kind](x, torch.randn(k, 40, generator=generator), generator)[1] for k in sizes]
    x = INPUTS[kind](x, codebooks[0], generator)[0].to(compute)
    arguments = x, torch.cat(codebooks), sizes, beam_size
    actual = cuda_emulation.residual_quantize(*arguments, tables=tables)
    expected = cuda_emulation.residual_quantize(*arguments, tables=tables, capacity=0)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("beam_size", [2, 5, 32])
def test_beams_reach_the_error_of_an_fp64_search(beam_size, dtype, tables, generator):
    x, codebooks = normal_inputs((70, 24, [130, 40, 9]), dtype, generator)
    arguments = torch.cat(codebooks), [130, 40, 9], beam_size
    quantized, codes = cuda_emulation.residual_quantize(x, *arguments, tables=tables)
    best, _ = reference.residual_quantize(x.double(), *arguments)
    rows = [codebook[code.long()] for codebook, code in zip(codebooks, codes.T, strict=True)]
    chosen = sum(row.double() for row in rows)
    error, least = ((x.double() - y).square().sum(1) for y in (chosen, best))
    assert error.mean().item() == pytest.approx(least.mean().item(), rel=1e-5)
    compute = torch.promote_types(dtype, torch.float32)
    assert_as_accurate_as_eager(quantized, sum(row.to(compute) for row in rows).to(dtype), chosen)


def test_strided_rows(tables, generator):
    wide = torch.randn(3 * 20, 2 * 12, generator=generator)
    codebooks = torch.randn(10, 12, generator=generator)
    for x in (wide[::3, ::2], wide[:20, 1:13], wide.T[:20, :12]):
        for strided, contiguous in zip(
            cuda_emulation.residual_quantize(x, codebooks, [5, 5], 2, tables=tables),
            cuda_emulation.residual_quantize(x.contiguous(), codebooks, [5, 5], 2, tables=tables),
            strict=True,
        ):
            assert torch.equal(strided, contiguous)


def test_algorithm_and_memory_follow_the_shape():
    def plan(*shape):
        return cuda_emulation.plan_residual_quantize(*shape)

    assert not plan(100_000, 128, [256] * 4, 1).tables
    assert not plan(1_000_000, 64, [8192] * 3, 1).tables
    assert plan(100_000, 768, [256] * 3, 1).tables  # small K, large D
    assert plan(100_000, 768, [256] * 3, 5).tables  # beams
    assert not plan(100, 768, [256] * 3, 1).tables  # filling them would take longer
    assert not plan(10**9, 64, [10_000] * 16, 5).tables  # nor do they fit
    assert plan(10**9, 128, [256] * 4, 5).workspace_bytes == plan(10**6, 128, [256] * 4, 5).workspace_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_are_read_and_rounded_as_torch_does(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    read = values[(values == 0) | ((values.abs() > 1e-15) & (values.abs() < 1e15))][::251, None]
    quantized, _ = cuda_emulation.residual_quantize(read, read.float(), [len(read)], 1)
    assert torch.equal(quantized, read)
    # One row that takes finite values, and what lies between two, as its codeword.
    wide = values.float()[::7]
    wide = torch.cat([wide, (wide[1:] + wide[:-1]) / 2, wide * (1 + 2**-12)])[None]
    quantized, _ = cuda_emulation.residual_quantize(torch.zeros(wide.shape, dtype=dtype), wide, [1], 1)
    assert torch.equal(quantized, wide.to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_nobody_checked_come_out_as_nan(value, tables, generator):
    x = torch.randn(40, 6, generator=generator)
    x[7, 5] = value
    codebooks = torch.randn(10, 6, generator=generator)
    quantized, codes = cuda_emulation.residual_quantize(x, codebooks, [5, 5], 2, tables=tables)
    assert torch.equal(quantized.isnan().any(1), torch.arange(40) == 7)
    assert quantized[7].isnan().all()
    assert codes.min() >= 0
    assert codes.max() < 5

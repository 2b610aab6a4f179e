"""The device code, executed on the CPU, in three orders of its threads."""

import itertools

import cuda_emulation
import pytest
import torch

from h2rec import reference
from h2rec.testing import assert_nearest_codes

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(cuda_emulation.CXX is None, reason="there is no C++ compiler"),
]

SHAPES = [  # rows, dimension, sizes of the levels
    (0, 8, [4, 4]),
    (1, 1, [1]),
    (31, 20, [33, 33]),
    (32, 16, [127, 128, 129]),
    (33, 17, [5, 300, 1, 17]),
    (97, 64, [256] * 4),
    (5, 3, [10_000]),
    (40, 24, [7] * 16),
    (9, 770, [20, 20]),
]


@pytest.fixture(params=["forward", "reverse", "random:5"])
def order(request, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATION_ORDER", request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_nearest(order, shape, dtype, generator):
    rows, dim, sizes = shape
    x = torch.randn(rows, dim, generator=generator).to(dtype)
    codebooks = [torch.randn(k, dim, generator=generator).to(dtype) / (l + 1) for l, k in enumerate(sizes)]  # noqa: E741
    quantized, codes = cuda_emulation.residual_quantize(x, torch.cat(codebooks), sizes, 1)
    assert quantized.dtype == dtype
    assert_nearest_codes(x, codebooks, quantized, codes)


def test_ties_go_to_the_lowest_index(order, generator):
    grid = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=3)))
    codebooks = torch.cat([grid] * 8)  # the same codewords in lanes and tiles of their own
    x = torch.randint(-3, 4, (70, 3), generator=generator).float()
    expected = reference.residual_quantize(x, codebooks, [len(grid) * 8], 1)
    for actual, wanted in zip(
        cuda_emulation.residual_quantize(x, codebooks, [len(grid) * 8], 1), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_are_read_and_rounded_as_torch_does(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    read = values[(values == 0) | ((values.abs() > 1e-15) & (values.abs() < 1e15))][::61, None]
    quantized, _ = cuda_emulation.residual_quantize(read, read.float(), [len(read)], 1)
    assert torch.equal(quantized, read)
    # One row that takes every finite value, and what lies between two, as its codeword.
    wide = values.float()
    wide = torch.cat([wide, (wide[1:] + wide[:-1]) / 2, wide * (1 + 2**-12)])[None]
    quantized, _ = cuda_emulation.residual_quantize(torch.zeros(wide.shape, dtype=dtype), wide, [1], 1)
    assert torch.equal(quantized, wide.to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_nobody_checked_come_out_as_nan(value, generator):
    x = torch.randn(40, 6, generator=generator)
    x[7, 5] = value
    quantized, codes = cuda_emulation.residual_quantize(x, torch.randn(10, 6, generator=generator), [5, 5], 1)
    assert torch.equal(quantized.isnan().any(1), torch.arange(40) == 7)
    assert quantized[7].isnan().all()
    assert codes.min() >= 0
    assert codes.max() < 5

"""Vectors to codes, against one matrix product and one argmin per level."""

from typing import NamedTuple

import pytest
import torch

from h2rec import ops

from . import _yardsticks, eager
from ._agreement import nearest_codes
from ._columns import h2rec_columns


class Shape(NamedTuple):
    N: int  # vectors
    D: int
    L: int  # levels
    K: int  # codewords per level


@pytest.mark.shapes(
    small=[Shape(10_000, 64, 4, 64)],
    paper=[Shape(20_000, 1536, 4, 128), Shape(100_000, 128, 4, 256)],
    production=[Shape(100_000, 768, 3, 256), Shape(100_000, 384, 3, 1024)],
)
def bench_encode(compare, shape, device):
    x = torch.randn(shape.N, shape.D, device=device)
    # Each level a third of the one before, as residuals shrink.
    scales = 3.0 ** -torch.arange(shape.L, device=device)
    codebooks = torch.randn(shape.L, shape.K, shape.D, device=device) * scales[:, None, None]

    compare(
        {
            "addmm + argmin": lambda: eager.residual_quantize(x, codebooks),
            "addmm + argmin, chunks": lambda: eager.residual_quantize_in_chunks(x, codebooks),
            **h2rec_columns("residual_quantize", lambda: ops.residual_quantize(x, codebooks), device.type),
        },
        baseline="addmm + argmin",
        agree=nearest_codes(x, codebooks),
        rate=_yardsticks.of_matrix_products(2.0 * shape.N * shape.D * shape.L * shape.K, device),
        memory=True,
    )

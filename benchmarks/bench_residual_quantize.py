"""Vectors to codes, against one matrix product and one argmin per level, and against other libraries."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from h2rec import ops

from . import _yardsticks, eager, rivals
from ._agreement import nearest_codes
from ._columns import h2rec_columns


class Shape(NamedTuple):
    N: int  # vectors
    D: int
    L: int  # levels
    K: int  # codewords per level


class BeamShape(NamedTuple):
    N: int
    D: int
    L: int
    K: int
    beam: int


@pytest.mark.shapes(
    small=[Shape(10_000, 64, 4, 64)],
    paper=[Shape(20_000, 1536, 4, 128), Shape(100_000, 128, 4, 256)],
    production=[Shape(100_000, 768, 3, 256), Shape(100_000, 384, 3, 1024)],
)
def bench_encode(compare, shape, device):
    x, codebooks = _inputs(shape, device)
    faiss = _faiss_columns(codebooks, 1)
    calls = {
        "addmm + argmin": lambda: eager.residual_quantize(x, codebooks),
        "addmm + argmin, chunks": lambda: eager.residual_quantize_in_chunks(x, codebooks),
    }
    if rivals.installed("vector_quantize_pytorch"):
        residual_vq = rivals.residual_vq(codebooks)
        calls["ResidualVQ"] = torch.inference_mode()(lambda: residual_vq(x)[:2])
    calls |= {name: lambda rival=rival: rival.encode(x) for name, rival in faiss.items()}
    calls |= h2rec_columns("residual_quantize", lambda: ops.residual_quantize(x, codebooks), device.type)

    agree = nearest_codes(x, codebooks)
    compare(
        calls,
        baseline="addmm + argmin",
        agree=lambda result, expected: agree(_unpacked(result, faiss), expected),
        rate=_yardsticks.of_matrix_products(_operations(shape), device),
        memory=True,
    )


@pytest.mark.shapes(
    small=[BeamShape(2_000, 64, 4, 64, 5)],
    paper=[BeamShape(20_000, 128, 4, 256, 5)],
    production=[BeamShape(20_000, 768, 3, 256, 5)],
)
def bench_beam_search(compare, shape, device):
    x, codebooks = _inputs(shape, device)
    faiss = _faiss_columns(codebooks, shape.beam)
    ours = h2rec_columns(
        "residual_quantize",
        lambda: ops.residual_quantize(x, codebooks, beam_size=shape.beam),
        device.type,
    )

    def mean_error(result) -> float:
        return (x - _unpacked(result, faiss)[0]).square().sum(1).mean().item()

    def agree(result, expected) -> None:  # ties and roundings may lead a few beams elsewhere
        assert mean_error(result) == pytest.approx(mean_error(expected), rel=1e-4)

    compare(
        {**{name: lambda rival=rival: rival.encode(x) for name, rival in faiss.items()}, **ours},
        baseline="faiss, tables" if faiss else "h2rec",
        agree=agree,
        rate=_yardsticks.of_matrix_products(_operations(shape), device),
        memory=True,
    )


def _inputs(shape: Shape | BeamShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(shape.N, shape.D, device=device)
    # Each level a third of the one before, as residuals shrink.
    scales = 3.0 ** -torch.arange(shape.L, device=device)
    return x, torch.randn(shape.L, shape.K, shape.D, device=device) * scales[:, None, None]


def _operations(shape: Shape | BeamShape) -> float:
    """Of one product with all codewords; a beam that forms its residuals does more."""
    return 2.0 * shape.N * shape.D * shape.L * shape.K


def _faiss_columns(codebooks: torch.Tensor, beam_size: int) -> dict[str, rivals.FaissResidualQuantizer]:
    if codebooks.device.type != "cpu" or not rivals.installed("faiss"):
        return {}
    return {
        name: rivals.FaissResidualQuantizer(codebooks, beam_size, use_beam_lut=tables)
        for name, tables in (("faiss, residuals", False), ("faiss, tables", True))
    }


def _unpacked(result, faiss: dict[str, rivals.FaissResidualQuantizer]):
    """(quantized, codes) of any column; faiss packs its codes, which is not timed."""
    return faiss["faiss, tables"].unpack(result) if isinstance(result, np.ndarray) else result

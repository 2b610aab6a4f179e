"""Learning codebooks by k-means on residuals, and semantic IDs of a file that does not fit into memory."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from h2rec import ops
from h2rec.ops.kmeans import fit_codebooks
from h2rec.tokenizers import RQKMeans, open_vectors

from . import _memory, rivals

NUM_ITERS = 25


class Shape(NamedTuple):
    N: int  # vectors; those of --vectors, if given
    D: int
    L: int  # levels
    K: int  # codewords per level


@pytest.mark.shapes(
    small=[Shape(3_000, 64, 3, 32)],
    paper=[Shape(20_000, 384, 4, 256)],
    production=[Shape(100_000, 128, 4, 256)],
)
def bench_fit(request, compare, shape, device):
    """Each column's name ends with the mean squared error of its codes (beam 1)."""
    path = request.config.getoption("--vectors")
    x = _clustered(shape) if path is None else torch.from_numpy(np.load(path).astype(np.float32))
    fits = {}
    if rivals.installed("faiss"):
        fits |= {
            "faiss": lambda: rivals.fit_faiss(x, shape.L, shape.K, NUM_ITERS, progressive=False),
            "faiss, progressive": lambda: rivals.fit_faiss(x, shape.L, shape.K, NUM_ITERS, progressive=True),
        }
    if rivals.installed("semantic_id"):
        fits["semantic-id"] = lambda: rivals.fit_semantic_id(x, shape.L, shape.K, NUM_ITERS)
    fits["h2rec"] = lambda: fit_codebooks(x.to(device), [shape.K] * shape.L, num_iters=NUM_ITERS)

    errors = {name: _error(x, fit()) for name, fit in fits.items()}
    named = {f"{name}, error {errors[name]:.4f}": fit for name, fit in fits.items()}
    baseline = next(iter(fits))
    assert errors["h2rec"] <= errors[baseline], f"h2rec ends in a worse minimum than {baseline}: {errors}"

    def agree(codebooks, expected) -> None:  # rivals end in minima as well, and not in one
        assert _error(x, codebooks) <= 1.1 * _error(x, expected)

    compare(named, baseline=next(iter(named)), agree=agree)


@pytest.mark.shapes(
    small=[Shape(20_000, 64, 3, 32)],
    paper=[Shape(100_000, 384, 4, 256)],
    production=[Shape(1_000_000, 384, 4, 256)],
)
def bench_tokenize_file(compare, shape, tmp_path):
    """fp16 from a .npy file; memory is what the process holds besides pages of files."""
    path = tmp_path / "vectors.npy"
    _write_half(path, shape)
    sample = torch.from_numpy(np.load(path, mmap_mode="r")[: 16 * shape.K].astype(np.float32))
    tokenizer = RQKMeans(shape.L, shape.K, num_iters=2).fit(sample)

    def agree(sids, _) -> None:
        assert sids.codes.shape == (shape.N, shape.L)
        assert torch.equal(
            torch.as_tensor(sids.codes[: len(sample)]), torch.as_tensor(tokenizer.tokenize(sample).codes)
        )

    compare(
        {"h2rec": lambda: tokenizer.tokenize(open_vectors(path))},
        baseline="h2rec",
        agree=agree,
        memory=_memory.peak_anonymous_bytes,
    )


def _clustered(shape: Shape) -> Tensor:
    """Unit vectors around centres that lie around centres, of which some are far more frequent than others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(shape.N, shape.D)
    for level in range(3):
        centres = torch.randn(8 ** (level + 1), shape.D, generator=generator) / 2**level
        frequencies = torch.rand(len(centres), generator=generator).square()
        x += centres[torch.multinomial(frequencies, shape.N, replacement=True, generator=generator)]
    return torch.nn.functional.normalize(x + 0.3 * torch.randn(x.shape, generator=generator))


def _error(x: Tensor, codebooks: list[Tensor]) -> float:
    quantized, _ = ops.residual_quantize(x, codebooks)
    return (x - quantized).square().sum(1).mean().item()


def _write_half(path: Path, shape: Shape) -> None:
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(shape.N, shape.D))
    random = np.random.default_rng(0)
    for start in range(0, shape.N, 10_000):
        rows = vectors[start : start + 10_000]
        rows[:] = random.standard_normal(rows.shape, dtype=np.float32)
    vectors.flush()

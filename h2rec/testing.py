"""Inputs and comparison rules that tests and benchmarks share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def zipf_ids(
    shape: Sequence[int], num_items: int, generator: torch.Generator, exponent: float = 1.05
) -> Tensor:
    """Item ids ``[*shape]`` int64 whose popularity falls as ``rank^-exponent``; ranks are spread over the ids."""
    weights = torch.arange(1, num_items + 1, dtype=torch.float64).pow(-exponent)
    cumulative = weights.cumsum(0) / weights.sum()
    uniform = torch.rand(tuple(shape), dtype=torch.float64, generator=generator)
    ranks = torch.searchsorted(cumulative, uniform).clamp_max(num_items - 1)
    return torch.randperm(num_items, generator=generator)[ranks]


def assert_as_accurate_as_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, *, draws: Sequence[tuple[Tensor, Tensor]] = ()
) -> None:
    """The error of ``actual`` against the fp64 result is at most twice that of eager code in the same dtype.

    The floor, for where eager code happens to be exact, is one rounding of the largest value; in fp64, where the exact
    result is rounded as well, it is two. The error of a single number in which much cancels is luck: ``draws`` are then
    (eager, exact) of other inputs drawn like these, and eager's error is the largest of all.
    """
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert not actual.isnan().any(), "the result holds NaN"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    eager_error = max(
        (plain.double() - truth).abs().max().item() for plain, truth in ((eager, exact), *draws)
    )
    roundings = 2 if actual.dtype == torch.float64 else 1
    floor = roundings * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= 2 * eager_error + floor, (
        f"error {error:.3g}, eager code's {eager_error:.3g}, floor {floor:.3g}"
    )


def assert_nearest_codes(x: Tensor, codebooks: Sequence[Tensor], quantized: Tensor, codes: Tensor) -> None:
    """``codes`` are a residual quantization of ``x``: the oracle for codes wherever near ties may flip one.

    Residuals are rebuilt in fp64 from the codes themselves; at each level the chosen codeword is as near as the
    nearest, up to 1e-5 of the mean squared distance; and ``quantized`` is the sum of the chosen rows.
    """
    assert codes.dtype == torch.int32
    assert codes.shape == (x.shape[0], len(codebooks))
    if x.shape[0] == 0:
        return
    residual = x.double()
    total = torch.zeros_like(residual)
    for level, codebook in enumerate(codebooks):
        rows = codebook.double()
        level_codes = codes[:, level].long()
        assert level_codes.min() >= 0
        assert level_codes.max() < rows.shape[0]
        distances = torch.cdist(
            residual, rows, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()  # [N, K]
        excess = distances.gather(1, level_codes[:, None]).squeeze(1) - distances.min(1).values
        bound = 1e-5 * distances.mean().item()
        assert excess.max().item() <= bound, (
            f"level {level}: excess distance {excess.max():.3g} > {bound:.3g}"
        )
        total += rows[level_codes]
        residual = residual - rows[level_codes]
    eager = sum(
        codebook.to(torch.promote_types(x.dtype, torch.float32))[codes[:, level].long()]
        for level, codebook in enumerate(codebooks)
    )
    assert_as_accurate_as_eager(quantized, eager.to(x.dtype), total)

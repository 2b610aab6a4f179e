"""Rules of agreement, applied before anything is timed; the measures are those of h2rec.testing."""

from collections.abc import Callable, Sequence

from torch import Tensor

from h2rec.testing import assert_as_accurate_as_eager, assert_nearest_codes

MAX_CHECKED_ROWS = 4096  # distances to all codewords in fp64 take far longer than what they check


def as_accurate_as(exact: Sequence[Tensor]) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """Each tensor of a result errs at most twice as much as the baseline's; `exact` is the baseline in fp64."""

    def agree(result: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for actual, eager, truth in zip(result, expected, exact, strict=True):
            assert_as_accurate_as_eager(actual, eager, truth)

    return agree


def nearest_codes(x: Tensor, codebooks: Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """A result (quantized, codes) chooses the nearest codewords, up to near ties; on rows spread over `x`."""
    step = -(-x.shape[0] // MAX_CHECKED_ROWS)

    def agree(result: Sequence[Tensor], _expected: Sequence[Tensor]) -> None:
        quantized, codes = result
        assert codes.shape[0] == x.shape[0], f"{codes.shape[0]} rows of codes for {x.shape[0]} vectors"
        assert_nearest_codes(x[::step], codebooks, quantized[::step], codes[::step].int())

    return agree

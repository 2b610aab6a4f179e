"""Nearest codewords level by level: vectors to codes, and to the sum of the chosen codewords."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from h2rec.ops import _backends
from h2rec.ops._checks import check_dim, check_finite_rows, check_floating, check_same_device, check_tensor
from h2rec.ops._codebooks import pack_codebooks
from h2rec.ops._registry import define


def residual_quantize(
    x: Tensor, codebooks: Tensor | Sequence[Tensor], *, beam_size: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Quantizes each row of ``x`` to one codeword per level.

    With :math:`r_0 = x`, level l chooses the codeword nearest to the residual (the lowest index on a tie),
    :math:`k_l = \arg\min_k |r_l - c_{l,k}|^2`, and leaves :math:`r_{l+1} = r_l - c_{l,k_l}` to the next.

    Args:
        x: ``[N, D]``, floating point; N may be 0.
        codebooks: ``[L, K, D]``, or a sequence of L tensors ``[K_l, D]``.
        beam_size: the number of partial sums nearest to ``x`` that are kept after each level; ties go to the
            earlier parent, then to the lower code. A wider beam is better on average, not for every row.

    Returns:
        ``quantized [N, D]`` in the dtype of ``x``, the sum of the chosen codewords, differentiable with respect to
        ``codebooks`` only; and ``codes [N, L]`` int32. Arithmetic is fp32, or fp64 if an input is fp64.

    Raises:
        ValueError: a shape or ``beam_size`` is wrong, or rows of ``x`` are not finite.
        TypeError: an input is no tensor, or not floating point.
    """
    check_tensor("x", x)
    packed, sizes = pack_codebooks(codebooks)
    return _residual_quantize(x, packed, sizes, beam_size)


def _check(x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int) -> None:
    check_floating("x", x)
    check_dim("x", x, ("N", "D"))
    check_same_device("codebooks", codebooks, "x", x)
    torch._check_value(
        x.shape[1] == codebooks.shape[1],
        lambda: f"x has dimension {x.shape[1]}, but codebooks has {codebooks.shape[1]}",
    )
    torch._check_value(beam_size >= 1, lambda: f"beam_size must be at least 1, got {beam_size}")


def narrow_beam(sizes: Sequence[int], beam_size: int) -> int:
    """The widest beam that makes a difference: there are no more paths before the last level."""
    return min(beam_size, math.prod(sizes[:-1]))


def _kernel(x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int) -> tuple[Tensor, Tensor]:
    _check(x, codebooks, sizes, beam_size)
    check_finite_rows("x", x)
    beam_size = narrow_beam(sizes, beam_size)
    return _backends.choose("residual_quantize", x.device.type, beam_size)(x, codebooks, sizes, beam_size)


def _fake(x: Tensor, codebooks: Tensor, sizes: list[int], beam_size: int) -> tuple[Tensor, Tensor]:
    _check(x, codebooks, sizes, beam_size)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (x.shape[0], len(sizes)), dtype=torch.int32
    )


def _setup_context(ctx, inputs, output) -> None:
    _, codebooks, sizes, _ = inputs
    _, codes = output
    ctx.save_for_backward(codes)
    ctx.mark_non_differentiable(codes)
    ctx.sizes, ctx.dtype = sizes, codebooks.dtype


def _backward(ctx, grad_quantized: Tensor, _grad_codes) -> tuple[None, Tensor | None, None, None]:
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    (codes,) = ctx.saved_tensors
    compute = torch.promote_types(torch.promote_types(ctx.dtype, grad_quantized.dtype), torch.float32)
    grad = grad_quantized.to(compute)
    by_level = [
        # Sorts where it runs in parallel, so that the order of the sum is fixed; index_add_ would use atomics.
        torch.ops.aten.embedding_dense_backward(grad, codes[:, level].long(), size, -1, False)
        for level, size in enumerate(ctx.sizes)
    ]
    return None, torch.cat(by_level).to(ctx.dtype), None, None


_residual_quantize = define(
    "residual_quantize(Tensor x, Tensor codebooks, SymInt[] sizes, SymInt beam_size) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)

"""The code-guided contrastive loss, forward and backward, against B x B matrices."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from h2rec import ops
from h2rec.testing import zipf_ids

from . import _yardsticks, eager
from ._agreement import as_accurate_as
from ._columns import h2rec_columns
from ._harness import Rate

MIN_SHARED_CODES = 3
TEMPERATURE = 0.5  # the paper's


class Shape(NamedTuple):
    B: int  # batch
    D: int
    L: int  # levels


@pytest.mark.shapes(small=[Shape(256, 32, 4)], paper=[Shape(1024, 64, 4)], production=[Shape(8192, 64, 4)])
def bench_forward_backward(compare, shape, device):
    leaves, positives = make_batch(shape, device)

    def theirs(leaves, loss_of=eager.alignment_loss):
        loss = loss_of(*leaves, *positives, MIN_SHARED_CODES, TEMPERATURE)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    rivals = {"eager": lambda: theirs(leaves)}
    if shape.B >= 1024:  # compiling takes a minute
        compiled = torch.compile(eager.alignment_loss)
        rivals["torch.compile"] = lambda: theirs(leaves, compiled)
    exact = theirs([leaf.detach().double().requires_grad_() for leaf in leaves])
    compare(
        {**rivals, **h2rec_columns("alignment_loss", lambda: ours(leaves, *positives), device.type)},
        baseline="eager",
        agree=as_accurate_as(exact),
        rate=matrix_products(shape, device),
        memory=True,
    )


@pytest.mark.shapes(
    small=[Shape(512, 32, 4)],
    paper=[Shape(4096, 64, 4)],
    production=[Shape(16_384, 64, 4), Shape(65_536, 64, 4)],
)
def bench_large_batch(compare, shape, device):
    """Beyond what B x B matrices leave room for: time grows as B^2, memory as B."""
    leaves, positives = make_batch(shape, device)

    def agree(result, expected):
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(result, expected, strict=True))

    compare(
        {"h2rec": lambda: ours(leaves, *positives)},
        baseline="h2rec",
        agree=agree,
        rate=matrix_products(shape, device),
        memory=True,
    )


def make_batch(shape: Shape, device: torch.device) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Both embeddings [B, D]; item ids [B] and codes [B, L]."""
    generator = torch.Generator().manual_seed(0)
    num_items, codebook_size = 20_000, 128
    item_ids = zipf_ids([shape.B], num_items, generator).to(device)
    codes = torch.randint(codebook_size, (num_items, shape.L), dtype=torch.int32, generator=generator)
    leaves = [torch.randn(shape.B, shape.D, device=device, requires_grad=True) for _ in range(2)]
    return leaves, (item_ids, codes.to(device)[item_ids])


def ours(leaves: list[Tensor], item_ids: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    loss = ops.alignment_loss(
        *leaves,
        item_ids=item_ids,
        codes=codes,
        min_shared_codes=MIN_SHARED_CODES,
        temperature=TEMPERATURE,
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def matrix_products(shape: Shape, device: torch.device) -> Rate:
    """One product forward; backward the same again and two for the gradients."""
    return _yardsticks.of_matrix_products(8.0 * shape.B**2 * shape.D, device)

"""The code-guided contrastive loss, forward and backward, against B x B matrices."""

from typing import NamedTuple

import pytest
import torch

from h2rec import ops
from h2rec.testing import zipf_ids

from . import _yardsticks, eager
from ._agreement import as_accurate_as
from ._columns import h2rec_columns

MIN_SHARED_CODES = 3
TEMPERATURE = 0.5  # the paper's


class Shape(NamedTuple):
    B: int  # batch
    D: int
    L: int  # levels


@pytest.mark.shapes(small=[Shape(256, 32, 4)], paper=[Shape(1024, 64, 4)], production=[Shape(8192, 64, 4)])
def bench_forward_backward(compare, shape, device):
    generator = torch.Generator().manual_seed(0)
    num_items, codebook_size = 20_000, 128
    item_ids = zipf_ids([shape.B], num_items, generator).to(device)
    codes = torch.randint(codebook_size, (num_items, shape.L), dtype=torch.int32, generator=generator)
    codes = codes.to(device)[item_ids]
    leaves = [torch.randn(shape.B, shape.D, device=device, requires_grad=True) for _ in range(2)]

    def theirs(leaves):
        loss = eager.alignment_loss(*leaves, item_ids, codes, MIN_SHARED_CODES, TEMPERATURE)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def ours():
        loss = ops.alignment_loss(
            *leaves,
            item_ids=item_ids,
            codes=codes,
            min_shared_codes=MIN_SHARED_CODES,
            temperature=TEMPERATURE,
        )
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    exact = theirs([leaf.detach().double().requires_grad_() for leaf in leaves])
    compare(
        {"eager": lambda: theirs(leaves), **h2rec_columns("alignment_loss", ours, device.type)},
        baseline="eager",
        agree=as_accurate_as(exact),
        # One product forward; backward the same again and two for the gradients.
        rate=_yardsticks.of_matrix_products(8.0 * shape.B**2 * shape.D, device),
        memory=True,
    )

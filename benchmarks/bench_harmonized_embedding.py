"""Item ids to semantic and hash embeddings, against gathers of nn.Embedding's kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from h2rec import ops
from h2rec.testing import zipf_ids

from . import _yardsticks, eager
from ._agreement import as_accurate_as
from ._columns import h2rec_columns

BY_LEVEL, BAG, COMPILED, OURS = "eager F.embedding", "eager F.embedding_bag", "torch.compile", "h2rec"
BASELINE = BY_LEVEL


class Shape(NamedTuple):
    T: int  # tokens: item ids in the batch
    D: int
    L: int  # levels
    K: int  # codewords per level
    R: int  # items, and rows of the hash table


class Setting:
    """Zipf ids, codes and tables, and what each column computes from them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device = device
        self.item_ids = zipf_ids([shape.T], shape.R, generator).to(device)
        codes = torch.randint(shape.K, (shape.R, shape.L), dtype=torch.int32, generator=generator)
        self.codes = codes.to(device)
        self.codes_in_stack = self.codes + torch.arange(0, shape.L * shape.K, shape.K, device=device).int()
        self.codebooks = torch.randn(shape.L, shape.K, shape.D, device=device)
        self.hash_table = torch.randn(shape.R, shape.D, device=device)
        self.cotangents = torch.randn(2, shape.T, shape.D, device=device)

    def compare(
        self,
        compare: Callable,
        rivals: tuple[str, ...],
        *,
        backward: bool,
        sparse: bool = False,
        **options: Any,
    ) -> None:
        columns = {
            **{name: self._call(name, backward, sparse) for name in rivals},
            **h2rec_columns("harmonized_embedding", self._call(OURS, backward, sparse), self.device.type),
        }
        agree = as_accurate_as(_in_one_form(self._call(BASELINE, backward, sparse, torch.float64)()))
        compare(
            columns,
            baseline=BASELINE,
            agree=lambda result, expected: agree(_in_one_form(result), _in_one_form(expected)),
            **options,
        )

    def _call(
        self, form: str, backward: bool, sparse: bool, dtype: torch.dtype = torch.float32
    ) -> Callable[[], tuple]:
        """Gives (semantic [T, D], hashed [T, D]), followed by the gradients of the form's tables if asked for."""
        books = {
            BY_LEVEL: self.codebooks.unbind(),
            COMPILED: self.codebooks.unbind(),
            BAG: [self.codebooks.flatten(0, 1)],
            OURS: [self.codebooks],
        }
        leaves = [t.detach().to(dtype).requires_grad_(backward) for t in (*books[form], self.hash_table)]
        cotangents = self.cotangents.to(dtype).unbind()
        by_level = eager.harmonized_embedding
        if form == COMPILED:
            by_level = torch.compile(by_level, dynamic=False, fullgraph=True)

        def forward() -> tuple[Tensor, Tensor]:
            *books, table = leaves
            if form in (BY_LEVEL, COMPILED):
                return by_level(self.item_ids, self.codes, books, table, sparse=sparse)
            if form == BAG:
                return eager.harmonized_embedding_bag(
                    self.item_ids, self.codes_in_stack, *books, table, sparse=sparse
                )
            return ops.harmonized_embedding(self.item_ids, self.codes, *books, table, sparse=sparse)

        def forward_backward() -> tuple[Tensor, ...]:
            for leaf in leaves:
                leaf.grad = None
            outputs = forward()
            torch.autograd.backward(outputs, cotangents)
            return *(output.detach() for output in outputs), *(leaf.grad for leaf in leaves)

        return forward_backward if backward else forward

    def bytes_forward(self) -> float:
        """What must move at least: ids, codes and table rows of the tokens, the codebooks once, both outputs."""
        tokens, levels, dim = self.item_ids.numel(), self.codes.shape[1], self.hash_table.shape[1]
        return tokens * (8 + 4 * levels + 3 * 4 * dim) + 4 * self.codebooks.numel()

    def bytes_backward(self, *, sparse: bool) -> float:
        """Ids, codes and both cotangents are read; gradients of the codebooks and of the table's rows are written."""
        tokens, levels, dim = self.item_ids.numel(), self.codes.shape[1], self.hash_table.shape[1]
        rows = len(self.item_ids.unique()) if sparse else len(self.hash_table)
        written = 4 * (self.codebooks.numel() + rows * dim)
        return tokens * (8 + 4 * levels + 2 * 4 * dim) + written


def _in_one_form(result: tuple[Tensor, ...]) -> list[Tensor]:
    """semantic, hashed; the gradient of the codebooks as [L * K, D], that of the table dense."""
    semantic, hashed, *grads = result
    if not grads:
        return [semantic, hashed]
    *books, table = grads
    return [
        semantic,
        hashed,
        torch.cat([book.flatten(0, -2) for book in books]),
        table.to_dense() if table.is_sparse else table,
    ]


lookups = pytest.mark.shapes(
    small=[Shape(1_600, 32, 4, 64, 2_000)],
    paper=[Shape(25_600, 64, 4, 256, 1_000_000)],
    production=[Shape(200_000, 64, 4, 256, 1_000_000)],
)


@lookups
def bench_forward(compare, shape, device):
    setting = Setting(shape, device)
    with torch.no_grad():
        setting.compare(
            compare,
            (BY_LEVEL, BAG, COMPILED),
            backward=False,
            rate=_yardsticks.of_copies(setting.bytes_forward(), device),
            memory=True,
        )


@lookups
def bench_forward_backward_sparse(compare, shape, device):
    _forward_backward(compare, shape, device, sparse=True)


@pytest.mark.shapes(
    small=[Shape(1_600, 32, 4, 64, 2_000)],
    paper=[Shape(25_600, 64, 4, 256, 20_000)],
    production=[Shape(200_000, 64, 4, 256, 20_000)],
)
def bench_forward_backward_dense(compare, shape, device):
    _forward_backward(compare, shape, device, sparse=False)


def _forward_backward(compare, shape, device, *, sparse):
    setting = Setting(shape, device)
    bytes_moved = setting.bytes_forward() + setting.bytes_backward(sparse=sparse)
    setting.compare(
        compare,
        (BY_LEVEL, BAG, COMPILED),
        backward=True,
        sparse=sparse,
        rate=_yardsticks.of_copies(bytes_moved, device),
        memory=True,
    )


@pytest.mark.shapes(
    small=[Shape(1_000, 32, 4, 64, 2_000)],
    paper=[Shape(1_000, 64, 4, 256, 20_000)],
    production=[Shape(1_000, 64, 4, 256, 1_000_000)],
)
def bench_inference(compare, shape, device):
    """A thousand tokens: what a call costs beside its work."""
    with torch.inference_mode():
        Setting(shape, device).compare(compare, (BY_LEVEL, BAG), backward=False)

"""What `h2rec.planning` predicts for this machine, beside what is measured; a case beyond a factor of two fails."""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from h2rec import SemanticIds, ops
from h2rec.data import SequenceBatch
from h2rec.models import H2Rec
from h2rec.optim import RowwiseAdagrad
from h2rec.planning import SHARED_NEGATIVES, Device, Plan, Work
from h2rec.testing import zipf_ids
from h2rec.training.losses import sampled_softmax, target_smoothing

from ._harness import time_interleaved
from ._report import format_seconds
from ._yardsticks import of_copies, of_gathers, of_matrix_products

WITHIN = 2.0


class Shape(NamedTuple):
    B: int  # sequences, all of full length
    T: int  # positions
    D: int
    L: int  # levels
    K: int  # codewords per level
    N: int  # items

    def plan(self) -> Plan:
        return Plan(self.N, self.D, self.L, self.K, batch=self.B, length=self.T)


SHAPES = pytest.mark.shapes(
    small=[Shape(64, 50, 64, 4, 256, 100_000)],
    paper=[Shape(256, 50, 64, 4, 256, 1_000_000), Shape(128, 200, 64, 4, 128, 1_000_000)],
    production=[Shape(256, 50, 128, 4, 256, 4_000_000)],
)


@pytest.fixture
def memory_kept() -> Iterator[None]:
    """malloc keeps what is freed, as the allocator for GPUs does: else some lookups fault all of their outputs in anew.

    Plans count no page faults. glibc gives back what is free at the end of its heap; in a training step that is little.
    """
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names of malloc.h
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
    yield
    mallopt(trim_threshold, 2**26)  # these two are where glibc ends when it adjusts them by itself
    mallopt(mmap_threshold, 2**25)
    mallopt(mmap_max, 2**16)


def machine(device: torch.device) -> Device:
    """This one, now: rates of copies, gathers and `torch.mm`; other instructions and the network count for nothing."""
    yardsticks = [of(1.0, device) for of in (of_copies, of_gathers, of_matrix_products)]
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timed = time_interleaved(
        {one.yardstick: one.yardstick_call for one in yardsticks}, synchronise=synchronise
    )
    bandwidth, gathers, flops = (
        one.yardstick_per_call / column.median for one, column in zip(yardsticks, timed, strict=True)
    )
    return Device("here", math.inf, bandwidth, flops, flops, math.inf, math.inf, bandwidth / gathers)


def check(compare, device: torch.device, work: list[Work], call: Callable) -> None:
    """Times `call`, whose work is known, and holds it against what the machine's rates of just before predict."""
    here = machine(device)
    predicted = sum(part.seconds(here) for part in work)
    name = f"h2rec (predicted {format_seconds(predicted)})"
    measured = compare({name: call}, baseline=name, agree=lambda result, expected: None).column(name).median
    assert predicted / WITHIN <= measured <= predicted * WITHIN, (
        f"measured / predicted: {measured / predicted:.2f}"
    )


def work_of(plan: Plan, *names: str) -> list[Work]:
    return [part for part in plan.step() if part.name.strip() in names]


@SHAPES
def bench_step(compare, shape, device):
    """Forward, sampled softmax, target smoothing, backward, AdamW, and row-wise Adagrad on the table."""
    check(compare, device, shape.plan().step(), _training_step(shape, device))


@SHAPES
@pytest.mark.usefixtures("memory_kept")
def bench_lookup(compare, shape, device):
    tables, ids = _tables(shape, device), _ids(shape, [shape.plan().looked_up], device)
    check(
        compare,
        device,
        work_of(shape.plan(), "harmonized_embedding"),
        lambda: ops.harmonized_embedding(ids, *tables),
    )


@SHAPES
@pytest.mark.usefixtures("memory_kept")
def bench_lookup_and_backward(compare, shape, device):
    codes, *tables = _tables(shape, device)
    ids = _ids(shape, [shape.plan().looked_up], device)
    for table in tables:
        table.requires_grad_()
    gradients = [torch.randn(len(ids), shape.D, device=device) for _ in range(2)]

    def call() -> tuple[torch.Tensor, ...]:
        outputs = ops.harmonized_embedding(ids, codes, *tables, sparse=True)
        return torch.autograd.grad(outputs, tables, gradients)

    check(compare, device, work_of(shape.plan(), "harmonized_embedding", "its backward"), call)


@SHAPES
def bench_quantize(compare, shape, device):
    rows = min(shape.N, 100_000)  # its time is that of a row
    vectors = torch.randn(rows, shape.D, device=device).half()
    codebooks = torch.randn(shape.L, shape.K, shape.D, device=device)
    work = shape._replace(N=rows).plan().tokenizing()
    check(compare, device, work, lambda: ops.residual_quantize(vectors.float(), codebooks))


@SHAPES
def bench_ranking(compare, shape, device):
    items = min(shape.N, 1_000_000)
    model = _model(shape._replace(N=items), device).eval()
    users = torch.randn(shape.B, 2 * shape.D, device=device)
    work = shape._replace(N=items).plan().ranking()

    @torch.no_grad()
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.score_topk(users, model.item_vector_parts(), 10)

    check(compare, device, work, call)


def _ids(shape: Shape, size: list[int], device: torch.device) -> torch.Tensor:
    return zipf_ids(size, shape.N, torch.Generator().manual_seed(0)).to(device)


def _tables(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    codes = torch.randint(shape.K, (shape.N, shape.L), device=device, dtype=torch.int32)
    return [
        codes,
        torch.randn(shape.L, shape.K, shape.D, device=device),
        torch.randn(shape.N, shape.D, device=device),
    ]


def _model(shape: Shape, device: torch.device) -> H2Rec:
    sids = SemanticIds(torch.randint(shape.K, (shape.N, shape.L)), codebook_sizes=(shape.K,) * shape.L)
    return H2Rec(sids, dim=shape.D, max_length=shape.T, sparse=True).to(device)


def _training_step(shape: Shape, device: torch.device) -> Callable[[], float]:
    model = _model(shape, device)
    table = model.embedding.hash_table
    adam = torch.optim.AdamW([p for p in model.parameters() if p is not table], fused=True)
    adagrad = RowwiseAdagrad([table])
    ids = _ids(shape, [shape.B, shape.T + 1], device)
    lengths = torch.full((shape.B,), shape.T, device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    batch = SequenceBatch(torch.arange(shape.B, device=device), inputs, lengths, targets, None)
    negatives = _ids(shape, [SHARED_NEGATIVES], device)
    related = torch.randint(shape.N, (shape.B * shape.T,), device=device)
    pairs, is_target = torch.stack([targets.flatten(), related], dim=1), related == targets.flatten()
    left_out = torch.zeros(shape.B * shape.T, SHARED_NEGATIVES, dtype=torch.bool, device=device)
    log_expected = torch.zeros(SHARED_NEGATIVES, device=device)
    shares = torch.full((shape.B * shape.T,), 0.3, device=device)

    def step() -> float:
        users, _ = model.training_outputs(batch)
        users = users.flatten(0, 1)
        vectors = model.item_vectors(torch.cat([targets.flatten(), negatives]))
        of_targets, of_negatives = vectors.tensor_split((targets.numel(),))
        first, related = model.item_vectors(pairs).split(1, dim=1)
        loss = sampled_softmax(
            users, of_targets, of_negatives, log_expected, left_out, related[:, 0], is_target
        )
        loss = loss + target_smoothing(users, first.squeeze(1), related, shares)
        loss.backward()
        adam.step()
        adagrad.step()
        adam.zero_grad()
        return loss.item()

    return step

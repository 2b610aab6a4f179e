import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from h2rec import SemanticIds
from h2rec.layers import HarmonizedEmbedding, HashEmbedding, SemanticEmbedding
from h2rec.optim import RowwiseAdagrad
from h2rec.testing import assert_as_accurate_as_eager

NUM_ITEMS, DIM = 30, 5
# Batches repeat an item, and come back to it.
BATCHES = torch.tensor([[3, 3, 7, 3, 1], [7, 2, 2, 9, 9], [3, 7, 29, 0, 0]])
LR, EPS = 0.3, 0.01


def definition(table, sums, grad):
    """One step on the rows of a dense gradient that are not zero; in place, in the arguments' dtypes."""
    for row in range(len(table)):
        g = grad[row].to(sums.dtype)
        if g.any():
            sums[row] += g.square().sum() / DIM
            table[row] = (table[row].to(sums.dtype) - LR * g / (sums[row].sqrt() + EPS)).to(table.dtype)


def make_layers():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (NUM_ITEMS, 3), generator=generator)
    sids = SemanticIds(codes, codebook_sizes=(4, 4, 4))
    torch.manual_seed(0)
    return {
        "hash": HashEmbedding(NUM_ITEMS, DIM, sparse=True),
        "hash multi": HashEmbedding(NUM_ITEMS, DIM, mode="multi", num_buckets=11, sparse=True),
        "hash padded": HashEmbedding(NUM_ITEMS, DIM, padding_idx=3, sparse=True),
        "prefix": SemanticEmbedding(sids, DIM, pooling="prefix", num_buckets=11, sparse=True),
        "both": HarmonizedEmbedding(sids, DIM, sparse=True),
        "both gate": HarmonizedEmbedding(sids, DIM, mode="qr", fusion="gate", sparse=True),
    }


@pytest.fixture(params=make_layers())
def layer(request, device):
    return make_layers()[request.param].to(device)


def losses(layer):
    """A random linear function of the layer's output, for each batch."""
    table = layer.hash_table
    weights = torch.randn(*BATCHES.shape, DIM, generator=torch.Generator().manual_seed(1))
    for item_ids, weight in zip(BATCHES.to(table.device), weights.to(table), strict=True):
        yield lambda item_ids=item_ids, weight=weight: (layer(item_ids) * weight).sum()


def train(layer, optimizer, steps=slice(None)):
    for loss in list(losses(layer))[steps]:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_is_the_definition(dtype, device):
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(NUM_ITEMS, DIM, generator=generator).to(device, dtype))
    wide = torch.promote_types(dtype, torch.float32)
    exact = table.detach().double(), torch.zeros(NUM_ITEMS, dtype=torch.float64, device=device)
    eager = table.detach().clone(), torch.zeros(NUM_ITEMS, dtype=wide, device=device)
    optimizer = RowwiseAdagrad([table], lr=LR, eps=EPS, in_backward=False)
    for rows in BATCHES.to(device):
        values = torch.randn(len(rows), DIM, generator=generator).to(device, dtype)
        table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape)  # repeats rows
        grad = table.grad.coalesce().to_dense()
        definition(*eager, grad)
        definition(*exact, grad.double())
        optimizer.step()
    assert optimizer.state[table]["sum"].dtype == wide
    for actual, plain, expected in zip((table, optimizer.state[table]["sum"]), eager, exact, strict=True):
        assert_as_accurate_as_eager(actual.detach(), plain, expected)


@pytest.mark.parametrize("in_backward", [True, False])
def test_trains_layers_by_the_definition(layer, in_backward):
    layer = layer.double()
    twin = copy.deepcopy(layer)
    twin.table.sparse = False
    sums = torch.zeros_like(twin.hash_table[:, 0])
    optimizer = RowwiseAdagrad([layer.hash_table], lr=LR, eps=EPS, in_backward=in_backward)
    for loss, twin_loss in zip(losses(layer), losses(twin), strict=True):
        optimizer.zero_grad()
        loss().backward()
        assert (layer.hash_table.grad is None) == in_backward
        optimizer.step()
        twin.hash_table.grad = None
        twin_loss().backward()
        with torch.no_grad():
            definition(twin.hash_table, sums, twin.hash_table.grad)
    torch.testing.assert_close(layer.hash_table, twin.hash_table)
    torch.testing.assert_close(optimizer.state[layer.hash_table]["sum"], sums)


def test_equal_bits_in_every_run_and_both_ways(layer):
    tables = []
    for in_backward in (True, True, False):
        twin = copy.deepcopy(layer)
        train(twin, RowwiseAdagrad([twin.hash_table], lr=LR, in_backward=in_backward))
        tables.append(twin.hash_table)
    assert not torch.equal(tables[0], layer.hash_table)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


def test_sums_all_uses_in_one_backward(layer):
    """A table may be looked up for the input and again for the targets."""
    twin = copy.deepcopy(layer)
    RowwiseAdagrad([layer.hash_table], lr=LR)
    sum(loss() for loss in losses(layer)).backward()
    optimizer = RowwiseAdagrad([twin.hash_table], lr=LR, in_backward=False)
    for loss in losses(twin):
        loss().backward()
    optimizer.step()
    torch.testing.assert_close(layer.hash_table, twin.hash_table)


def test_trains_a_compiled_layer(layer):
    twin = copy.deepcopy(layer)
    train(twin, RowwiseAdagrad([twin.hash_table], lr=LR))
    optimizer = RowwiseAdagrad([layer.hash_table], lr=LR)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer)
    torch.testing.assert_close(layer.hash_table, twin.hash_table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_goes_on_from_a_checkpoint(layer, dtype):
    layer = layer.to(dtype)
    resumed = copy.deepcopy(layer)
    optimizer = RowwiseAdagrad([layer.hash_table], lr=LR)
    train(layer, optimizer)

    first = RowwiseAdagrad([resumed.hash_table], lr=LR)
    train(resumed, first, slice(0, 1))
    file = io.BytesIO()
    torch.save([resumed.state_dict(), first.state_dict()], file)
    train(resumed, first, slice(1, 2))  # work that is lost
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    second = RowwiseAdagrad([resumed.hash_table], lr=99.0)
    second.load_state_dict(state)
    train(resumed, second, slice(1, None))
    assert torch.equal(resumed.hash_table, layer.hash_table)
    sums = second.state[resumed.hash_table]["sum"]
    assert sums.dtype == torch.float32
    assert torch.equal(sums, optimizer.state[layer.hash_table]["sum"])
    assert not torch.equal(sums, state["state"][0]["sum"])  # what was loaded stays as it was


def test_obeys_a_schedule_after_loading(device):
    layer = HashEmbedding(NUM_ITEMS, DIM, sparse=True).to(device)
    optimizer = RowwiseAdagrad([{"params": [layer.weight], "lr": 0.2}])
    train(layer, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)
    before = layer.weight.detach().clone()
    train(layer, optimizer)
    schedule.step()
    assert torch.equal(layer.weight, before)


def test_the_optimizer_that_was_built_last_updates(device):
    layer = HashEmbedding(NUM_ITEMS, DIM, sparse=True).to(device)
    twin = copy.deepcopy(layer)
    forgotten = RowwiseAdagrad([layer.weight], lr=5.0)
    train(layer, RowwiseAdagrad([layer.weight], lr=LR))
    train(twin, RowwiseAdagrad([twin.weight], lr=LR))
    assert torch.equal(layer.weight, twin.weight)
    assert not forgotten.state


class Allocations(TorchDispatchMode):
    """The sizes of all results, but those that live in the memory of ``table``."""

    def __init__(self, table):
        super().__init__()
        self.table, self.sizes = table, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_sparse:
                continue
            if tensor.untyped_storage().data_ptr() != self.table.untyped_storage().data_ptr():
                self.sizes.append(tensor.numel())
        return result


def test_allocates_nothing_of_the_size_of_the_table(device):
    layer = HashEmbedding(1000, DIM, sparse=True).to(device)
    optimizer = RowwiseAdagrad([layer.weight])
    with Allocations(layer.weight) as allocations:
        train(layer, optimizer)
    assert max(allocations.sizes) == 1000  # the sums
    dense = HashEmbedding(1000, DIM).to(device)
    with Allocations(dense.weight) as allocations:
        train(dense, torch.optim.SGD([dense.weight]))
    assert max(allocations.sizes) == 1000 * DIM


def test_bad_arguments(device):
    layer = HashEmbedding(NUM_ITEMS, DIM).to(device)
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        RowwiseAdagrad([layer.weight], lr=-1)
    with pytest.raises(ValueError, match="eps must be at least 0, got nan"):
        RowwiseAdagrad([layer.weight], eps=float("nan"))
    with pytest.raises(ValueError, match=r"params must have shape \[R, D\], got \[3, 4, 5\]"):
        RowwiseAdagrad([nn.Parameter(torch.zeros(3, 4, 5))])
    message = (
        r"the gradient of a table \[30, 5\] must be sparse, got a dense one; build its layer with sparse=True"
    )
    for in_backward in (True, False):
        optimizer = RowwiseAdagrad([layer.weight], in_backward=in_backward)
        with pytest.raises(ValueError, match=message):
            train(layer, optimizer)


def test_sparse_adam_is_adam_on_the_rows_of_a_batch(layer):
    """Rows outside the batch keep their moments: no decay, and no step from old ones."""
    layer = layer.double()
    twin = copy.deepcopy(layer)
    twin.table.sparse = False
    lr, (beta1, beta2), eps = 0.1, (0.9, 0.999), 1e-8
    table = twin.hash_table
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    optimizer = torch.optim.SparseAdam([layer.hash_table], lr=lr)
    train(layer, optimizer)
    for step, loss in enumerate(losses(twin), start=1):
        table.grad = None
        loss().backward()
        with torch.no_grad():
            touched = table.grad.any(1, keepdim=True)
            first = torch.where(touched, beta1 * first + (1 - beta1) * table.grad, first)
            second = torch.where(touched, beta2 * second + (1 - beta2) * table.grad.square(), second)
            size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            table -= torch.where(touched, size * first / (second.sqrt() + eps), 0)
    torch.testing.assert_close(layer.hash_table, table)

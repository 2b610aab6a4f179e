"""The formulas of the planner against what the model does, counted while it runs."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from h2rec import SemanticIds
from h2rec.data import SequenceBatch
from h2rec.models import H2Rec
from h2rec.ops import score_topk
from h2rec.optim import RowwiseAdagrad
from h2rec.planning import GPUS, Device, Plan, Work
from h2rec.training.losses import sampled_softmax, target_smoothing

VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
}
VIEWS |= {"detach", "split", "unbind", "as_strided", "alias", "lift_fresh"}
VIEWS |= {"is_coalesced", "indices", "values"}
VIEWS |= {"empty", "empty_like", "new_empty", "new_empty_strided"}


class BytesMoved(TorchDispatchMode):
    """Sums what every operator reads and writes; our own are counted by formulas of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace != "h2rec" and function._opname not in VIEWS:
            read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            if function._opname in ("index", "index_select"):  # which read what they return
                args = (result, *args[1:])
            elif function._opname == "index_copy_":  # which writes what it reads
                args, result = args[1:], args[3]
            tensors = [leaf for leaf in tree_leaves((args, read, result)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def make(planned: Plan, num_items: int = 150) -> tuple[H2Rec, SequenceBatch]:
    """The model of a plan with few items, and a batch of full sequences."""
    torch.manual_seed(0)
    codes = torch.randint(planned.codebook, (num_items, planned.levels))
    sids = SemanticIds(codes, codebook_sizes=(planned.codebook,) * planned.levels)
    model = H2Rec(sids, dim=planned.dim, num_layers=planned.layers, max_length=planned.length)
    items = torch.randint(num_items, (planned.batch, planned.length + 1))
    lengths = torch.full((planned.batch,), planned.length)
    users = torch.arange(planned.batch)
    return model, SequenceBatch(users, items[:, :-1].contiguous(), lengths, items[:, 1:].contiguous(), None)


def train(model: H2Rec, batch: SequenceBatch) -> None:
    users, losses = model.training_outputs(batch)
    assert not losses
    users.backward(torch.ones_like(users))


def lose(model: H2Rec, planned: Plan, *, smoothed: bool) -> None:
    """The sampled softmax of a batch, with few negatives."""
    num_positions, size = planned.tokens, 2 * planned.dim
    users = torch.randn(num_positions, size, requires_grad=True)
    targets, negatives = torch.randn(num_positions, size), torch.randn(8, size)
    left_out = torch.zeros(num_positions, 8, dtype=torch.bool)
    smoothing, related = 0.0, ()
    if smoothed:
        vectors = model.item_vectors(torch.randint(model.num_items, (num_positions, 2)))
        first, second = vectors.split(1, dim=1)
        smoothing = target_smoothing(users, first.squeeze(1), second, torch.full((num_positions,), 0.3))
        related = second[:, 0], torch.zeros(num_positions, dtype=torch.bool)
    loss = sampled_softmax(users, targets, negatives, torch.zeros(8), left_out, *related)
    (loss + smoothing).backward()


# Others than those that the formulas were fitted to.
PLANS = [
    Plan(150, 32, 3, 16, batch=64, length=40, layers=1),
    Plan(150, 48, 5, 16, batch=48, length=50, layers=3),
]


def work(planned: Plan, name: str) -> Work:
    (found,) = (part for part in planned.step() if part.name == name)
    return found


@pytest.mark.parametrize("planned", PLANS, ids=["small", "large"])
def test_parameters(planned):
    model, _ = make(planned)
    assert model.embedding.codebooks.numel() == planned.codebook_parameters
    others = sum(parameter.numel() for parameter in model.parameters()) - planned.codebook_parameters
    assert others - model.embedding.hash_table.numel() == planned.dense_parameters


def bytes_moved_and_kept(model: H2Rec, call: Callable[[], None]) -> tuple[int, int]:
    """What the operators of a forward and backward pass read and write, and what autograd keeps between the two."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with BytesMoved() as moved, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return moved.total, sum(kept.values())


@pytest.mark.parametrize("planned", PLANS, ids=["small", "large"])
def test_bytes_of_a_step(planned):
    model, batch = make(planned)
    moved, kept = bytes_moved_and_kept(model, lambda: train(model, batch))
    assert moved == pytest.approx(work(planned, "activations").bytes, rel=0.1)
    moved_with, kept_with = bytes_moved_and_kept(model, lambda: lose(model, planned, smoothed=True))
    moved_without, _ = bytes_moved_and_kept(model, lambda: lose(model, planned, smoothed=False))
    assert moved_with - moved_without == pytest.approx(work(planned, "target smoothing").bytes, rel=0.05)
    assert kept + kept_with == pytest.approx(planned.memory()["activations"], rel=0.1)


@pytest.mark.parametrize("planned", PLANS, ids=["small", "large"])
def test_products_of_a_step(planned):
    model, batch = make(planned)
    with FlopCounterMode(display=False) as projections:  # it knows no attention on a CPU
        train(model, batch)
    formula = work(planned, "products of the model").products
    assert projections.get_total_flops() == pytest.approx(formula, rel=0.05)
    with FlopCounterMode(display=False) as everything, sdpa_kernel(SDPBackend.MATH):
        train(model, batch)
    attention = everything.get_total_flops() - projections.get_total_flops()
    # A fused kernel multiplies once more, for it does not keep the weights, and need not look ahead.
    seen = (planned.length + 1) / (2 * planned.length)
    assert attention * 7 / 6 * seen == pytest.approx(work(planned, "attention").products, rel=0.05)
    with FlopCounterMode(display=False) as smoothed:
        lose(model, planned, smoothed=True)
    with FlopCounterMode(display=False) as unsmoothed:
        lose(model, planned, smoothed=False)
    added = smoothed.get_total_flops() - unsmoothed.get_total_flops()
    assert added == work(planned, "target smoothing").products


def test_bytes_and_products_of_the_loss():
    planned = Plan(2000, 64, batch=16, length=50)
    tensors = [torch.randn(n, 128, requires_grad=True) for n in (800, 800, 1024)]
    left_out = torch.zeros(800, 1024, dtype=torch.bool)
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **options: mm_flop(left, right)}
    products = FlopCounterMode(display=False, custom_mapping=in_place)
    with BytesMoved() as moved, products:
        sampled_softmax(*tensors, torch.zeros(1024), left_out).backward()
    assert moved.total == pytest.approx(work(planned, "sampled softmax").bytes, rel=0.05)
    assert products.get_total_flops() == work(planned, "products of the loss").products


def test_bytes_of_an_update_of_the_table():
    table = torch.nn.Parameter(torch.randn(1000, 64))
    rows = torch.arange(0, 900, 3)
    optimizer = RowwiseAdagrad([table], in_backward=False)
    values = torch.randn(len(rows), 64)
    options = {"is_coalesced": True, "check_invariants": True}
    table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, **options)
    optimizer.step()  # makes the sums
    with BytesMoved() as moved:
        optimizer.step()
    # Plans that differ by so many rows, each of which is also written when summed.
    more, less = Plan(1 + len(rows)), Plan(1)
    difference = work(more, "row-wise Adagrad").bytes - work(less, "row-wise Adagrad").bytes
    assert moved.total == difference - len(rows) * more.row_bytes


def test_bytes_and_products_of_ranking():
    planned = Plan(40_000, 32, batch=256)
    model = make(planned, planned.items)[0].eval()
    users = torch.randn(planned.batch, 2 * planned.dim)
    with BytesMoved() as moved, FlopCounterMode(display=False) as products:
        score_topk(users, model.item_vector_parts(), 1)  # more are looked at more, by and by less
    vectors, scores, best = planned.ranking()
    assert products.get_total_flops() == scores.products
    lookup = planned.items * (4 * planned.levels + 3 * planned.row_bytes)
    assert moved.total == pytest.approx(vectors.bytes - lookup + scores.bytes + best.bytes, rel=0.1)


def test_memory_is_shared_out_by_rows():
    one, eight = (Plan(100_000_000, 128, 4, 8192, gpus=gpus).memory() for gpus in (1, 8))
    assert one["hash table"] == 100_000_000 * 128 * 4
    for name in ("hash table", "optimizer state of the table"):
        assert eight[name] == one[name] / 8
    for name in ("codes", "codebooks", "activations", "gradient of the table"):
        assert eight[name] == one[name]


def test_dense_optimizers_touch_the_whole_table():
    sparse, dense = (Plan(10_000_000, sparse=sparse) for sparse in (True, False))
    assert dense.memory()["optimizer state of the table"] == 2 * 10_000_000 * 64 * 4
    assert sparse.memory()["optimizer state of the table"] == 10_000_000 * 4
    assert dense.step()[-1].bytes > 100 * sparse.step()[-1].bytes


def test_a_step_does_not_grow_with_the_catalog():
    steps = [Plan(items).step() for items in (1_000_000, 100_000_000)]
    assert steps[0] == steps[1]


def test_what_binds():
    device = Device("d", 1e9, bandwidth=10, fp32=2, bf16=8, instructions=5, link=1)
    assert Work("w", bytes=30, products=4, instructions=5, sent=1).seconds_by_limit(device) == {
        "memory": 3,
        "products": 2,
        "instructions": 1,
        "network": 1,
    }
    assert (Work("w", 30, 4).limit(device), Work("w", 30, 4).seconds(device)) == ("memory", 3)
    assert Work("w", 10, 4).limit(device) == "products"
    assert Work("w", products=4, dtype="bfloat16").seconds(device) == 0.5


def test_rows_at_random_places():
    device = Device("d", 1e9, bandwidth=10, fp32=2, bf16=8, instructions=5, link=1, gather_cost=3)
    assert Work("w", bytes=30, gathered=10).seconds(device) == (20 + 3 * 10) / 10
    planned = Plan(10_000, 64, 4, 256)
    lookup = work(planned, "harmonized_embedding")
    of_an_item = 4 * 4 + 4 * 64  # codes, and a row of the table
    assert lookup.gathered == planned.looked_up * of_an_item
    assert all(0 <= part.gathered <= part.bytes for part in planned.step())


def test_the_readme_of_the_kernels_has_the_same_numbers():
    """csrc/README.md, floors on an H100, and kernels/README.md, bytes."""
    h100 = GPUS[1]
    (quantize,) = Plan(100_000, 128, 4, 256).tokenizing()
    assert quantize.products / h100.bf16 == pytest.approx(26.2e9 / 990e12, rel=0.01)
    assert quantize.instructions / h100.instructions == pytest.approx(0.31e-3, rel=0.02)
    planned = Plan(10_000, 64, 4, 256)
    bytes_per_item = work(planned, "harmonized_embedding").bytes / planned.looked_up
    assert 25_600 * bytes_per_item == pytest.approx(20.3e6, rel=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match="codebook must be at least 1, got 0"):
        Plan(10, codebook=0)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'float8'"):
        Plan(10, dtype="float8")
    assert all(math.isfinite(part.seconds(GPUS[0])) for part in Plan(1, 1, 1, 1, 1, 1, 1, 1).step())
